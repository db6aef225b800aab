"""Which files are recordings, by their names: decided here for folders that are watched, folders of
training data, noise, and addresses that do not answer.
"""

from __future__ import annotations

from pathlib import Path, PurePath

AUDIO_SUFFIXES = (
    *(".wav", ".wave", ".w64", ".rf64", ".bwf", ".flac", ".ogg", ".oga", ".spx", ".opus", ".mp3"),
    *(".mp2", ".mpa", ".mpga", ".m4a", ".m4b", ".m4r", ".aac", ".adts", ".ac3", ".eac3", ".dts"),
    *(".wma", ".amr", ".awb", ".3ga", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".mka"),
    *(".weba", ".ape", ".wv", ".tta", ".gsm", ".voc", ".dss", ".ra"),
)
"""Files that hold sound and no picture."""
MEDIA_SUFFIXES = (
    *(".mp4", ".m4v", ".mkv", ".mov", ".qt", ".avi", ".divx", ".webm", ".ts", ".m2ts", ".mts"),
    *(".m2t", ".tp", ".trp", ".flv", ".f4v", ".mpg", ".mpeg", ".mpe", ".vob", ".mod", ".tod"),
    *(".wmv", ".asf", ".3gp", ".3g2", ".3gpp", ".3gpp2", ".ogv", ".ogm", ".rm", ".rmvb", ".mxf"),
    *(".dv", ".dav", ".nut", ".wtv"),
    *AUDIO_SUFFIXES,
)
"""Files that hold sound, with a picture or without."""
# What lies beside recordings: tables, texts, other subtitles, pictures, archives, unfinished files.
_OTHER_SUFFIXES = {
    *(".csv", ".json", ".json5", ".jsonl", ".md", ".parquet", ".txt", ".tsv", ".xml", ".yaml"),
    *(".yml", ".xlsx", ".xls", ".ods", ".pdf", ".doc", ".docx", ".html", ".htm", ".url", ".log"),
    *(".srt", ".vtt", ".ass", ".ssa", ".sub", ".idx", ".sbv", ".ttml", ".dfxp", ".lrc", ".sup"),
    *(".nfo", ".description", ".annotations", ".textgrid", ".eaf", ".npy", ".npz", ".pt", ".py"),
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".heic", ".avif"),
    *(".ico", ".psd", ".zip", ".gz", ".tar", ".7z", ".rar", ".xz", ".bz2", ".zst", ".db", ".ini"),
    *(".part", ".ytdl", ".crdownload", ".tmp", ".bak", ".lock", ".md5", ".sha256", ".sfk", ".pkf"),
}
_SYSTEM_FOLDERS = {"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"}


def is_recording(name: str | PurePath) -> bool:
    """Whether the ending of a name is one of recordings."""
    return PurePath(name).suffix.lower() in MEDIA_SUFFIXES


def may_be_recording(name: str | PurePath) -> bool:
    """Whether a file of this name is worth an attempt, where its place already says that it should
    be a recording: any ending, or none, that is not known for something else.
    """
    return PurePath(name).suffix.lower() not in _OTHER_SUFFIXES


def is_visible(path: PurePath, folder: PurePath) -> bool:
    """Whether a file of a folder is its user's: not hidden (nor the resource file of another
    system, `._talk.mp4`), and in no folder of the system.
    """
    parts = path.relative_to(folder).parts
    return not any(part.startswith(".") or part in _SYSTEM_FOLDERS for part in parts)


def visible_files(folder: Path) -> list[Path]:
    """The files below a folder that are its user's, sorted."""
    return sorted(p for p in folder.rglob("*") if is_visible(p, folder) and p.is_file())
