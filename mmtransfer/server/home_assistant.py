"""Cameras as devices of Home Assistant, by MQTT discovery: connection, text, alerts, on and off.

https://www.home-assistant.io/integrations/mqtt/#mqtt-discovery
"""

from __future__ import annotations

import hashlib
import logging
import queue
import re
import threading
from contextlib import suppress
from typing import Any

from mmtransfer import __version__
from mmtransfer.data.printing import json_line, printable
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import Alert, ClassifiedSound, Item, Sound, Transcript
from mmtransfer.monitoring.outputs.alerts import mqtt_client
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.kinds import goes_on
from mmtransfer.server.cameras import Watch
from mmtransfer.server.entries import LOUD

logger = logging.getLogger(__name__)
PREFIX = "homeassistant"
"""Where Home Assistant looks for devices."""
_EVERY_S = 1.0  # states
_STATE_CHARACTERS = 255  # Home Assistant takes no more
_COMMANDS = 100  # that wait; more than that is nobody's wish


class HomeAssistant:
    """Announces live cameras at a broker, below the topic in its address, and follows the commands
    there.

    What is on and connected is retained by the broker, spoken text is not: nobody could have it
    forgotten there. The last will says `offline`.

    Raises:
        UserError: paho-mqtt is missing, or an address of another form.
    """

    def __init__(self, url: str, watch: Watch):
        self._client, self._base, self._connect = mqtt_client(url)
        self._watch = watch
        self._node = f"mmtransfer_{hashlib.sha256(self._base.encode()).hexdigest()[:8]}"
        self._retained: dict[str, str] = {}  # by topic, as the broker has it
        self._commands: queue.Queue[tuple[str, bool] | None] = queue.Queue(_COMMANDS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="home assistant", daemon=True)
        self._client.will_set(self._status, "offline", qos=1, retain=True)
        self._client.on_connect = self._greet
        self._client.on_message = self._take

    @property
    def _status(self) -> str:
        return f"{self._base}/status"

    def start(self) -> None:
        """Connect, and go on with that whatever happens."""
        self._connect()
        self._thread.start()

    def close(self) -> None:
        """Say that it is over."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
            if self._client.is_connected():
                sent = self._client.publish(self._status, "offline", qos=1, retain=True)
                with suppress(ValueError, RuntimeError):
                    sent.wait_for_publish(1.0)
            with suppress(OSError):
                self._client.disconnect()
            self._client.loop_stop()

    def put(self, item: Item | None) -> None:
        """Publish what was spoken and found."""
        if not self._client.is_connected():
            return
        if isinstance(item, Transcript) and item.text:
            is_long = len(item.text) > _STATE_CHARACTERS
            text = f"{item.text[: _STATE_CHARACTERS - 1]}…" if is_long else item.text
            self._client.publish(f"{self._topic(item.camera)}/text", text)
        elif isinstance(item, Alert):
            found = {"event_type": "keyword", "keyword": item.keyword, "text": item.text}
            self._client.publish(f"{self._topic(item.camera)}/alert", json_line(found))
        elif isinstance(item, Sound | ClassifiedSound):
            label = item.label if isinstance(item, ClassifiedSound) else LOUD
            found = {"event_type": "sound", "sound": label}
            self._client.publish(f"{self._topic(item.camera)}/alert", json_line(found))

    # --- in paho's thread ---------------------------------------------------------------------

    def _greet(self, client: Any, *_: Any) -> None:
        self._retained = {}  # the broker may have been another one
        client.subscribe([(f"{self._base}/+/set", 1), (f"{PREFIX}/status", 1)])
        with suppress(queue.Full):
            self._commands.put_nowait(None)

    def _take(self, client: Any, data: Any, message: Any) -> None:
        if message.topic == f"{PREFIX}/status":
            if message.payload == b"online":  # it has been started again, and knows nothing
                self._retained = {}
            return
        asked = {b"ON": True, b"OFF": False}.get(message.payload)
        named = {self._slug(camera.name): camera.name for camera in self._watch.session.cameras}
        name = named.get(message.topic.split("/")[-2])
        if asked is not None and name is not None and not message.retain:
            with suppress(queue.Full):
                self._commands.put_nowait((name, asked))

    # --- in a thread of its own ---------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            command = None
            with suppress(queue.Empty):
                command = self._commands.get(timeout=_EVERY_S)
            if command is not None:
                name, is_on = command
                try:
                    self._watch.turn(name, is_on=is_on)
                    logger.info("%s: turned %s by mqtt", printable(name), "on" if is_on else "off")
                except UserError as error:
                    logger.warning("mqtt: %s", error)
            if self._client.is_connected():
                self._publish()

    def _publish(self) -> None:
        """Everything that the broker has not, or has otherwise."""
        wanted: dict[str, str] = {}
        for camera in self._watch.session.cameras:
            if goes_on(camera):
                wanted |= self._announced(camera) | self._states(camera)
        for topic in self._retained.keys() - wanted.keys() - {self._status}:
            wanted[topic] = ""  # of a camera that is gone: the broker forgets it
        wanted[self._status] = "online"
        known = self._retained
        for topic, text in wanted.items():
            if known.get(topic) != text:
                self._client.publish(topic, text, qos=1, retain=True)
                known[topic] = text

    def _states(self, camera: Camera) -> dict[str, str]:
        topic, stats = self._topic(camera.name), self._watch.session.stats
        one = stats.cameras.get(camera.name)
        return {
            f"{topic}/on": "OFF" if camera.name in self._watch.off else "ON",
            f"{topic}/connected": "ON" if one is not None and one.is_connected else "OFF",
        }

    def _announced(self, camera: Camera) -> dict[str, str]:
        topic, slug = self._topic(camera.name), self._slug(camera.name)
        device = {
            "identifiers": [f"{self._node}_{slug}"],
            "name": camera.name,
            "manufacturer": "mmtransfer",
            "sw_version": __version__,
        }
        entities: dict[str, dict[str, Any]] = {
            "switch/on": {"command_topic": f"{topic}/set", "icon": "mdi:ear-hearing"},
            "binary_sensor/connected": {"device_class": "connectivity"},
            "sensor/text": {"icon": "mdi:text"},
            "event/alert": {"event_types": ["keyword", "sound"]},
        }
        found = {}
        for kind, own in entities.items():
            component, _, name = kind.partition("/")
            content = own | {
                "name": {"on": "Transcription"}.get(name, name.capitalize()),
                "unique_id": f"{self._node}_{slug}_{name}",
                "state_topic": f"{topic}/{name}",
                "availability_topic": self._status,
                "device": device,
            }
            where = f"{PREFIX}/{component}/{self._node}/{slug}_{name}/config"
            found[where] = json_line(content)
        return found

    def _topic(self, camera: str) -> str:
        return f"{self._base}/{self._slug(camera)}"

    @staticmethod
    def _slug(name: str) -> str:
        """A camera's name as a part of topics; names that differ never become the same."""
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
        if plain == name:
            return name
        return f"{plain.strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
