"""Cameras as devices of Home Assistant, at a real broker."""

import json
import socket
from contextlib import contextmanager

import pytest
import yaml
from support.servers import running
from support.sources import Paced
from support.web import wait_for

from mmtransfer.errors import UserError
from mmtransfer.monitoring import Alert
from mmtransfer.server.home_assistant import PREFIX, HomeAssistant
from mmtransfer.server.options import ServerOptions


@contextmanager
def home(port):
    """What stands in for Home Assistant: what it gets, by topic, and a client that publishes."""
    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    got: dict[str, list[tuple[str, bool]]] = {}
    ready: list[bool] = []
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_connect = lambda c, *rest: c.subscribe([("#", 1)])
    client.on_subscribe = lambda *rest: ready.append(True)
    client.on_message = lambda c, d, m: got.setdefault(m.topic, []).append(
        (m.payload.decode(), m.retain)
    )
    client.connect("127.0.0.1", port)
    client.loop_start()
    wait_for(lambda: ready)
    yield got, client
    client.disconnect()
    client.loop_stop()


def last(got, topic):
    return got[topic][-1][0] if topic in got else None


@pytest.fixture
def place(speech, broker, tmp_path):
    """A file of two cameras, one of them with an odd name, and a broker."""
    port, start, _ = broker
    start()
    camera = Paced([speech], pace=2.0)
    listed = [{"name": name, "url": camera.url} for name in ("gate", "yard +/#")]
    content = {
        "cameras": listed,
        "model": "bundled:whisper-tiny.en",
        "mqtt": f"mqtt://127.0.0.1:{port}/site/ears",
        "keywords": ["words"],
    }
    path = tmp_path / "cameras.yaml"
    path.write_text(yaml.safe_dump(content))
    yield path, content, port
    camera.close()


def test_cameras_are_announced_followed_and_turned_off_and_on(place, fake_recognizer):
    fake_recognizer(lambda context_s: "some words here")
    path, content, port = place
    base = "site/ears"
    with home(port) as (got, client):
        with running({}, cameras=path, home_assistant=True) as server:
            wait_for(lambda: last(got, f"{base}/gate/connected") == "ON")
            assert last(got, f"{base}/status") == "online"
            configs = {topic: parts for topic, parts in got.items() if topic.startswith(PREFIX)}
            assert len(configs) == 8
            assert all("+" not in t and "#" not in t and t.endswith("/config") for t in configs)
            found = [json.loads(parts[-1][0]) for parts in configs.values()]
            assert {one["device"]["name"] for one in found} == {"gate", "yard +/#"}
            assert len({one["unique_id"] for one in found}) == 8
            assert {one["availability_topic"] for one in found} == {f"{base}/status"}
            switch = next(one for one in found if one.get("command_topic") == f"{base}/gate/set")
            assert last(got, switch["state_topic"]) == "ON"
            wait_for(lambda: last(got, f"{base}/gate/text") == "some words here")
            wait_for(lambda: f"{base}/gate/alert" in got)
            event = json.loads(last(got, f"{base}/gate/alert"))
            assert (event["event_type"], event["keyword"]) == ("keyword", "words")

            client.publish(switch["command_topic"], "OFF", qos=1)
            wait_for(lambda: last(got, switch["state_topic"]) == "OFF")
            wait_for(lambda: last(got, f"{base}/gate/connected") == "OFF")
            assert server.state.watch.off == {"gate"}
            for nonsense in ("", "off", "x" * 1000):
                client.publish(switch["command_topic"], nonsense, qos=1)
            client.publish(f"{base}/none/set", "OFF", qos=1)
            client.publish(switch["command_topic"], "ON", qos=1)
            wait_for(lambda: last(got, switch["state_topic"]) == "ON")
            assert server.state.watch.off == set()

            path.write_text(yaml.safe_dump(content | {"cameras": content["cameras"][:1]}))
            server.state.watch.reload()
            gone = [t for t, parts in configs.items() if "yard" in parts[0][0]]
            wait_for(lambda: all(last(got, topic) == "" for topic in gone))
        assert last(got, f"{base}/status") == "offline"
    with home(port) as (got, _):  # what the broker keeps: states, but nothing that was spoken
        wait_for(lambda: last(got, f"{base}/status") == "offline")
        wait_for(lambda: f"{base}/gate/on" in got)
        assert not any("some words" in text for parts in got.values() for text, _ in parts)


def test_a_server_that_is_gone_is_offline_by_its_last_will(place, broker, fake_recognizer):
    fake_recognizer()
    path, _, port = place
    with home(port) as (got, _), running({}, cameras=path, home_assistant=True) as server:
        wait_for(lambda: last(got, "site/ears/status") == "online")
        (one,) = [f for f in server.state.live._followers if isinstance(f, HomeAssistant)]
        one._client.socket().shutdown(socket.SHUT_RDWR)  # as if the machine had lost its power
        wait_for(lambda: ("offline", False) in got["site/ears/status"])
        wait_for(lambda: last(got, "site/ears/status") == "online")  # it has connected again
        one.put(Alert("gate", "w", "w", 1.0, "gate@1", 1.0, 2.0, "w"))


def test_what_cannot_be_announced_is_one_line(place, fake_recognizer):
    fake_recognizer()
    path, content, _ = place
    with pytest.raises(UserError, match="home_assistant: expected --cameras"):
        ServerOptions({"a": "b"}, home_assistant=True)
    del content["mqtt"]
    path.write_text(yaml.safe_dump(content))
    with (
        pytest.raises(UserError, match="home_assistant: expected mqtt: "),
        running({}, cameras=path, home_assistant=True),
    ):
        pass
