"""Text files of unknown encoding: what their bytes most probably say."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LEAST = 0.5  # of what is expected of a text in its own encoding
_NEIGHBOURS = (
    0.65  # of letters beyond ASCII, beside which another stands; languages in Latin: fewer
)
_SAMPLE = 1 << 18  # bytes
_CYRILLIC = "оеаинтсрвлкмдпуіј"
_KANA = "".join(map(chr, range(0x3041, 0x3094))) + "、。ー"
_HAN = (
    "的一是不了人我在有他这這中大来來上个個国國到说說们們为為子和你地出道也时時年得就那要下以生会會"
    "自着去之过過家学學对對可里裡后後小么麼心多天而能好都然没沒日于於起还還发發成事只作当當想看文无無"
    "开開手十用主行方又如前所本见見经經头頭面公同三已老从從动動两兩长長知，。？！、"
)
_HANGUL = "이다는을의에가고하지은를도로한어나사리기아그거니들서자요대시안일라게만해면인제있없말것"
_LATIN_MARKS = "’‘“”„‚–—…«»‹›°€§"


@dataclass(frozen=True)
class _Encoding:
    name: str
    frequent: str
    """Characters beyond ASCII of which most texts in it consist."""
    share: float
    """How much of a text they are."""
    languages: tuple[str, ...]
    is_latin: bool = False


_ENCODINGS = (
    _Encoding(
        "cp1252",
        "éèêëàâäáãåæçíìîïñóòôöõøœúùûüßýÿÉÈÊÀÂÄÁÅÆÇÍÑÓÖØÚÜ¿¡" + _LATIN_MARKS,
        1.0,
        ("en", "de", "fr", "es", "pt", "it", "nl", "sv", "da", "no", "nn", "fi", "is", "ca", "gl"),
        True,
    ),
    _Encoding(
        "cp1250",
        "áąäâăčćçďđéęěëíîłľńňóöôőřśšşťţúůüűýžźżßÁĄČĆĎÉĘĚÍŁŃÓÖŐŘŚŠŤÚŮÜÝŽŹŻ" + _LATIN_MARKS,
        1.0,
        ("pl", "cs", "sk", "hu", "sl", "hr", "bs", "ro", "sq"),
        True,
    ),
    _Encoding("cp1254", "çğıöşüâîûÇĞİÖŞÜ" + _LATIN_MARKS, 1.0, ("tr", "az"), True),
    _Encoding(
        "cp1257", "āčēģīķļņšūžąęėįųõäöüĀČĒĪŠŪŽÕÄÖÜ" + _LATIN_MARKS, 1.0, ("lt", "lv", "et"), True
    ),
    *(
        _Encoding(name, _CYRILLIC, 0.8, ("ru", "uk", "bg", "be", "mk", "sr", "kk", "mn"))
        for name in ("cp1251", "koi8-r", "cp866", "iso8859-5")
    ),
    _Encoding("cp1253", "αβγδεζηθικλμνξοπρστυφχψωάέήίόύώϊϋς", 0.9, ("el",)),
    _Encoding("cp1255", "אבגדהוזחטיכלמנסעפצקרשתךםןףץ", 0.9, ("he", "yi")),
    _Encoding("cp1256", "ابتثجحخدذرزسشصضطظعغفقكلمنهويىةءأإآئؤپچژگ،؟", 0.9, ("ar", "fa", "ur")),
    _Encoding("cp874", "านรอกเงมยลวดทสตะปบคหแจพชข่้ีัิ์ุ", 0.9, ("th",)),
    *(_Encoding(name, _KANA, 0.4, ("ja",)) for name in ("cp932", "euc_jp")),
    *(_Encoding(name, _HAN, 0.3, ("zh", "yue")) for name in ("gb18030", "big5hkscs")),
    _Encoding("cp949", _HANGUL, 0.4, ("ko",)),
)


def decode_text(data: bytes, language: str | None = None) -> tuple[str, str] | None:
    """A text and the encoding that it was taken to be in (`utf-8` where there is no doubt); None
    if no encoding known here fits. `language` is that of the text, if it is known.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _decoded(data, name)
    if b"\0" in data[:_SAMPLE]:  # in UTF-16 without its mark half of the bytes of ASCII are zero
        even, odd = data[:_SAMPLE:2].count(0), data[1:_SAMPLE:2].count(0)
        return _decoded(data, "utf-16-be" if even > odd else "utf-16-le")
    found = _decoded(data, "utf-8")
    if found is not None:
        return found
    best, best_score = None, _LEAST
    for encoding in _ENCODINGS:
        decoded = _decoded(data, encoding.name)
        if decoded is None:
            continue
        score = _score(decoded[0][:_SAMPLE], encoding)
        if language in encoding.languages:
            score *= 2
        if score > best_score:
            best, best_score = decoded, score
    return best


def _decoded(data: bytes, name: str) -> tuple[str, str] | None:
    try:
        return data.decode(name), "utf-8" if name == "utf-8-sig" else name
    except UnicodeDecodeError:
        return None


def _score(text: str, encoding: _Encoding) -> float:
    """How much of a text beyond ASCII is what texts in the encoding consist of; 1 is usual."""
    beyond = [index for index, character in enumerate(text) if not character.isascii()]
    letters = {index for index in beyond if text[index].isalpha()}
    beside = sum(index - 1 in letters or index + 1 in letters for index in letters)
    if not beyond or encoding.is_latin == (beside > _NEIGHBOURS * len(letters)):
        return 0.0
    frequent = set(encoding.frequent)
    return sum(text[index] in frequent for index in beyond) / len(beyond) / encoding.share
