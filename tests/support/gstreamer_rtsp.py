"""GStreamer's RTSP server as a program: plays a video to each client from its beginning.

For the system's Python: python3-gi, gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-good and -bad.
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402 - after the versions are named

PIPELINE = (
    "( filesrc location={video} ! qtdemux name=demux "
    "demux.audio_0 ! queue ! aacparse ! rtpmp4gpay name=pay0 pt=97 "
    "demux.video_0 ! queue ! h264parse ! rtph264pay name=pay1 pt=96 )"
)


def main() -> None:
    """Serve until killed."""
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_service(sys.argv[1])
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(PIPELINE.format(video=sys.argv[2]))
    server.get_mount_points().add_factory("/gate", factory)
    server.attach(None)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
