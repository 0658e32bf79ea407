"""What is sent to a chat server and what is made of its replies; a server that misbehaves on command answers."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from misbehaving import RED, SOON, ask, prompt_of, reply, serving
from mpa_edge.chat_messages import ENCODING, PNG_PIXELS, data_url, request_of
from mpa_edge.chat_vlm import ChatVlm
from mpa_edge.errors import InputError, ModelError
from mpa_edge.runtime.vlm import Decoding, Vlm

KEY = "sk-secret-0123456789"


def test_a_request_holds_the_picture_the_prompt_and_the_decoding() -> None:
    with serving() as server:
        (answer,) = ask(server, "What colour?", decoding=Decoding(7))
        ask(server, "What colour?", decoding=Decoding(7, temperature=0.5, top_p=0.9, seed=3))
    greedy, sampled = server.asked
    assert (answer.text, answer.finish_reason, answer.prompt_tokens, answer.error) == ("red", "stop", 9, None)
    assert answer.timings.total > 0
    assert (greedy["model"], greedy["temperature"], greedy["max_tokens"]) == ("only", 0, 7)
    assert "seed" not in greedy
    assert (sampled["temperature"], sampled["top_p"], sampled["seed"]) == (0.5, 0.9, 3)
    picture, text = greedy["messages"][0]["content"]
    assert text == {"type": "text", "text": "What colour?"}
    head, _, content = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(content))), RED)


def test_openai_itself_gets_the_limits_new_name() -> None:
    request = request_of("m", "api.openai.com", RED, "?", Decoding(5), None)
    assert request["max_completion_tokens"] == 5
    assert "max_tokens" not in request


def test_small_pictures_travel_without_loss_and_large_ones_as_good_jpeg(picture: Callable[..., Any]) -> None:
    def sent(image: Any, longest_edge: int | None = None) -> Any:
        return Image.open(io.BytesIO(base64.b64decode(data_url(image, longest_edge).partition(",")[2])))

    small, large = picture(512, 512), picture(513, 512)
    assert small.width * small.height == PNG_PIXELS
    assert np.array_equal(sent(small), small)
    assert sent(large).format == "JPEG"
    assert sent(large).size == large.size
    assert max(sent(large).quantization[0]) <= 12  # quality 95
    assert sent(large).layer[1][1:3] == (1, 1)  # chroma is not subsampled
    shrunk = sent(picture(1000, 500), longest_edge=100)
    assert (shrunk.size, shrunk.format) == ((100, 50), "PNG")
    assert sent(small, longest_edge=600).size == small.size  # never scaled up


def test_the_description_outlives_a_move_and_tells_what_shapes_answers() -> None:
    a, b = ChatVlm("http://localhost:8000/v1", "org/model"), ChatVlm("https://203.0.113.5:9000/v1/", "org/model")
    assert a.describe() == b.describe()
    assert a.describe() == {
        "engine": "chat",
        "model": "org/model",
        "image": {"longest_edge": None, **ENCODING},
    }
    assert ChatVlm("http://localhost/v1", "org/model", longest_edge=64).describe() != a.describe()
    assert isinstance(a, Vlm)
    assert a.name == "model"
    json.dumps(a.describe())


@pytest.mark.parametrize(
    ("said", "text", "finish", "error"),
    [
        (reply("it goes on and on", "length"), "it goes on and on", "length", None),
        (reply(None, "length"), "", "length", None),  # all tokens went into thinking
        (reply(""), "", "stop", None),
        (reply(" red\n", None), "red", "stop", None),
        (reply([{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]), "red", "stop", None),
        (reply(None), "", "error", "no text"),
        (reply([]), "", "error", "no text"),
        (reply(7), "", "error", "no text"),
        (reply(None, refusal="I will not look at this."), "", "error", "refused: I will not"),
        (reply("Half of", "content_filter"), "", "error", "content filter"),
        ({"choices": []}, "", "error", "no answer"),
        ({"choices": None, "error": {"message": "upstream broke"}}, "", "error", "upstream broke"),
        ({"choices": ["?"]}, "", "error", "no text"),
        ([1, 2], "", "error", "no answer"),
        ((200, '{"choices": [{"mess'), "", "error", "no JSON"),
        ((200, "<html>", {"Content-Type": "text/html"}), "", "error", "no answer"),
        ((400, {"error": {"message": "cannot decode the picture", "code": 400}}), "", "error", "HTTP 400: cannot dec"),
        ((413, "too large"), "", "error", "HTTP 413: too large"),
        ((422, {"detail": [{"input": "data:" + "x" * 9999}]}), "", "error", "HTTP 422"),
        ((403, {"error": {"message": "Your input was flagged"}}), "", "error", "HTTP 403: Your input was flagged"),
        ((500, {"error": {"message": "assert tile"}}, SOON), "", "error", "HTTP 500: assert tile"),
    ],
)
def test_one_bad_item_is_one_answer(said: Any, text: str, finish: str, error: str | None) -> None:
    with serving(lambda request, number: said if prompt_of(request) == "bad" else reply("fine")) as server:
        before, bad, after = ask(server, "good", "bad", "good")
    assert before.text == after.text == "fine"
    assert (bad.text, bad.finish_reason) == (text, finish)
    assert bad.error is None if error is None else error in bad.error
    assert bad.error is None or len(bad.error) <= 300


def test_as_many_requests_run_at_once_as_wanted_and_answers_keep_their_order() -> None:
    gate = threading.Barrier(3)
    running, peak, lock = [0], [0], threading.Lock()

    def together(request: Any, number: int) -> Any:
        with lock:
            running[0] += 1
            peak[0] = max(peak[0], running[0])
        gate.wait(20)  # nobody gets on before three are here
        with lock:
            running[0] -= 1
        return reply(prompt_of(request))

    with serving(together) as server:
        answers = ask(server, *map(str, range(12)), concurrency=3)
    assert peak[0] == 3
    assert [answer.text for answer in answers] == [str(number) for number in range(12)]


def test_the_only_model_of_a_server_needs_no_name() -> None:
    with serving(models=("org/the-model",)) as server:
        vlm = ChatVlm.load(server.url)
        assert (vlm.model, vlm.name) == ("org/the-model", "the-model")
        vlm.answer([RED], ["?"])
        assert server.asked[0]["model"] == "org/the-model"
        assert ChatVlm.load(server.url, name="teacher").name == "teacher"
        server.models = ("a", "b")
        with pytest.raises(InputError, match=rf"serves 2 models: .*{server.url}#MODEL. It has: a, b"):
            ChatVlm.load(server.url)
        assert ChatVlm.load(f"{server.url}#b").model == "b"
        for odd in (["not a list"], {"data": 3}, "<html>", [404, {}], [500, "?"]):
            server.models = odd if isinstance(odd, list) and len(odd) == 2 else [200, odd]
            with pytest.raises(InputError, match="does not list its models"):
                ChatVlm.load(server.url)
            assert ChatVlm.load(f"{server.url}#b").model == "b"
        server.models = [401, {"error": {"message": "no key"}}]
        with pytest.raises(ModelError, match=r"HTTP 401: no key\. Put a key"):
            ChatVlm.load(f"{server.url}#b").answer([RED], ["?"])


def test_the_key_comes_from_the_environment_and_is_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPA_EDGE_API_KEY", f"{KEY}\n")
    with serving(models=("only",)) as server:

        def gossip(request: Any, number: int) -> Any:
            told = {"error": {"message": f"you sent {server.headers[-1]['authorization']}"}}
            return (401 if prompt_of(request) == "fatal" else 400, told)

        server.script = gossip
        vlm = ChatVlm.load(server.url)
        (answer,) = vlm.answer([RED], ["?"])
        assert server.headers[-1]["authorization"] == f"Bearer {KEY}"
        with pytest.raises(ModelError) as caught:
            vlm.answer([RED], ["fatal"])
        told = [str(answer), str(caught.value), repr(caught.value), json.dumps(vlm.describe()), repr(vlm), vlm.name]
        assert "you sent Bearer ***" in told[0]
        assert "you sent Bearer ***" in told[1]
        assert not [text for text in told if KEY in text]
        monkeypatch.delenv("MPA_EDGE_API_KEY")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        ChatVlm(server.url, "only").answer([RED], ["?"])
        assert KEY not in str(server.headers[-1])
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(InputError, match="OPENAI_API_KEY holds characters"):
        ChatVlm("https://api.openai.com/v1", "m")


def test_a_key_that_a_server_answers_with_is_in_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPA_EDGE_API_KEY", KEY)
    with serving(models=(f"model of {KEY}",)) as server:

        def gossip(request: Any, number: int) -> Any:
            key = server.headers[-1]["authorization"]
            return reply([{"type": "text", "text": f"red, says {key[:12]}"}, {"type": "text", "text": key[12:]}])

        server.script = gossip
        vlm = ChatVlm.load(server.url)
        assert (vlm.name, vlm.describe()["model"]) == ("model of ***", "model of ***")
        assert vlm.answer([RED], ["?"])[0].text == "red, says Bearer ***"


def test_a_dummy_of_a_key_is_a_word_that_answers_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPA_EDGE_API_KEY", "EMPTY")
    with serving(lambda request, number: reply("EMPTY")) as server:
        assert ask(server, "What does the sign say?")[0].text == "EMPTY"
        server.models = ("EMPTY-7B",)
        assert ChatVlm.load(server.url).model == "EMPTY-7B"
