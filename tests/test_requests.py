"""Laws of orders: what was asked is what is kept, and what cannot be meant is refused in a sentence that names the key."""

import dataclasses
import json
import time

import pytest

from sora_jax.generate import requests
from sora_jax.generate.requests import Order, RequestError

ORDERS = [
    Order(prompt="a red circle", height=64, frames=17, seed=3),
    Order(image="a.png", prompt="ein roter Kreis, 赤い円 \u2028 \x85", seconds=2.5, fps=12),
    Order(extend="a.mp4", direction="backward", frames=8, start=0.5, end=2.0, fit="letterbox"),
    Order(connect=("a.mp4", "b.mp4"), frames=8),
    Order(loop=True, prompt="a", draft=0.5, strength=0.4),
    Order(loop="a.mp4"),
    Order(edit="a.mp4", strength=0, known_guidance=1.5, samples=3),
    Order(inpaint="a.mp4", mask="m.png", window=33),
    Order(outpaint="a.mp4", left=8, bottom=16),
    Order(interpolate="a.mp4", factor=4),
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.mode)
def test_json_and_back(order):
    assert requests.from_mapping(json.loads(json.dumps(order.given()))) == order


@pytest.mark.parametrize("suffix", ["json", "jsonl", "yaml", "yml"])
def test_request_files_hold_orders_and_paths_beside_them(tmp_path, suffix):
    import yaml

    given = [order.given() for order in ORDERS]
    text = {
        "json": json.dumps(given),
        "jsonl": "\n\n".join(json.dumps(each, ensure_ascii=False) for each in given) + "\r\n",
    }.get(suffix, yaml.safe_dump(given, allow_unicode=True))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as some editors begin a file
    expected = [requests.resolve_paths(order, tmp_path) for order in ORDERS]
    assert requests.read_orders(path) == expected
    assert expected[3].connect == (str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"))
    assert requests.resolve_paths(Order(image="/x/a.png"), tmp_path).image == "/x/a.png"


def test_one_order_needs_no_list(tmp_path):
    for name, text in (("a.json", '{"prompt": "x"}'), ("a.yaml", "prompt: x\nframes: 9\n")):
        (tmp_path / name).write_text(text)
        assert requests.read_orders(tmp_path / name)[0].prompt == "x"


def test_modes_and_paths():
    assert [order.mode for order in ORDERS] == [
        "text", "image", "extend", "connect", "loop", "loop", "edit", "inpaint", "outpaint", "interpolate",
    ]  # fmt: skip
    assert Order(loop=True, prompt="a").paths() == {}
    assert ORDERS[7].paths() == {"inpaint": ("a.mp4",), "mask": ("m.png",)}
    assert ORDERS[3].paths() == {"connect": ("a.mp4", "b.mp4")}


def test_variations_are_seeds():
    orders = Order(prompt="a", seed=5, samples=3).variations()
    assert [order.seed for order in orders] == [5, 6, 7]
    assert all(order == Order(prompt="a", seed=order.seed) for order in orders)


BAD = [
    ({}, "prompt is empty; say what to show, or give one of image, extend"),
    ({"prompt": "  "}, "prompt is empty"),
    ({"promt": "a"}, r"'promt' is no key of an order; did you mean prompt\?"),
    ({"prompt": "a", "zzz": 1}, "'zzz' is no key of an order; they are prompt, height"),
    ({"prompt": "a", "fps": None}, "fps is empty; give it a value or leave it out"),
    ({"prompt": 5}, "prompt is 5; it must be text"),
    ({"prompt": "a" * 10_001}, r"prompt is 'aaa.*\.\.\..*'; it must be text of up to 10000 characters"),
    ({"prompt": "a", "height": 0}, "height is 0; it must be a whole number from 1 to 16384"),
    ({"prompt": "a", "height": 64.0}, "height is 64.0; it must be a whole number"),
    ({"prompt": "a", "frames": True}, "frames is True; it must be a whole number"),
    ({"prompt": "a", "frames": "9"}, "frames is '9'; it must be a whole number"),
    ({"prompt": "a", "fps": 0}, "fps is 0; it must be a number from 0.01 to 1000"),
    ({"prompt": "a", "fps": 1e-6}, "fps is 1e-06; it must be a number from 0.01"),
    ({"prompt": "a \ud800"}, "prompt is .*; it must be text"),
    ({"prompt": "a", "fps": float("nan")}, "fps is nan"),
    ({"prompt": "a", "fps": 10**400}, r"fps is 1000.*\.\.\..*000; it must be"),
    ({"prompt": "a", "seed": 2**31}, "seed is 2147483648; it must be a whole number from 0 to 2147483647"),
    ({"prompt": "a", "seed": 2**31 - 2, "samples": 3}, "seed 2147483646 with samples 3 goes beyond 2147483647"),
    ({"prompt": "a", "frames": 9, "seconds": 1}, "frames and seconds both say how long; give one of them"),
    ({"image": "a.png", "extend": "a.mp4"}, "image and extend are ways to make one video; use one of them an order"),
    ({"image": ""}, "image is ''; it must be the path of a file"),
    ({"image": "a\0b"}, "image is .*; it must be the path of a file"),
    ({"image": "a\udcff"}, "image is .*; it must be the path of a file as text, in UTF-8"),
    ({"connect": ["a.mp4"]}, "connect is .*; it must be a list of the paths of two files"),
    ({"connect": "ab"}, "connect is 'ab'; it must be a list"),
    ({"loop": False, "prompt": "a"}, "loop is False; it must be the path of a file as text, in UTF-8, or true"),
    ({"loop": True}, "loop is true, but prompt is empty"),
    ({"loop": True, "prompt": "a", "fit": "crop"}, "fit, start and end are for files, but loop is true"),
    ({"edit": "a.mp4", "strength": 1.5}, "strength is 1.5; it must be a number from 0 to 1"),
    ({"prompt": "a", "strength": 0.5}, "strength goes with edit or interpolate or draft; give one of them, or leave it out"),
    ({"edit": "a.mp4", "frames": 9}, "edit keeps the length of its video; leave frames and seconds out, or use extend"),
    ({"edit": "a.mp4", "draft": 0.5}, "edit begins from a whole video, which is its draft; leave draft out"),
    ({"inpaint": "a.mp4"}, "inpaint needs a mask; give mask an image or video that is white where to make anew"),
    ({"prompt": "a", "mask": "m.png"}, "mask goes with inpaint or edit"),
    ({"outpaint": "a.mp4"}, "outpaint needs pixels to add; give left, right, top or bottom"),
    ({"outpaint": "a.mp4", "left": 0}, "outpaint needs pixels to add"),
    ({"outpaint": "a.mp4", "left": -8}, "left is -8; it must be a whole number from 0"),
    ({"image": "a.png", "direction": "forward"}, "direction goes with extend"),
    ({"extend": "a.mp4", "direction": "sideways"}, "direction is 'sideways'; it must be one of forward, backward"),
    ({"extend": "a.mp4", "start": 2, "end": 1}, "start 2 is not before end 1"),
    ({"connect": ["a", "b"], "start": 2}, "start goes with extend or loop or"),
    ({"interpolate": "a.mp4", "factor": 1}, "factor is 1; it must be a whole number from 2 to 16"),
    ({"prompt": "a", "draft": 1.0}, "draft is 1.0; it must be a number between 0 and 1"),
    ({"prompt": "a", "fit": "crop"}, "fit goes with image or"),
    ("a red circle", "an order is a mapping of keys, such as prompt, but this is 'a red circle'"),
    ([], r"an order is a mapping of keys, such as prompt, but this is \[\]"),
    ({1: 2}, "1 is no key of an order"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "match"), BAD)
def test_what_cannot_be_meant_is_refused(given, match):
    with pytest.raises(RequestError, match=f"^{match}") as caught:
        requests.from_mapping(given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_every_field_is_checked():
    fields = {field.name for field in dataclasses.fields(Order)}
    for name in fields:
        with pytest.raises(RequestError, match=f"^{name} is "):
            requests.from_mapping({name: object()})


# Thirty lists of two of the one before: a thousand million strings, if they were written out.
LAUGHS = "- &a0 [x, x]\n" + "".join(f"- &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 30))
LAUGHS = "prompt:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines())


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.json", '[{"prompt": "a"}, {"prompt": "b", "hight": 8}]', "a.json, entry 2: 'hight' .* did you mean height?"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}\n', "a.jsonl, line 3: prompt is 3"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl, line 2: this is no JSON"),
        ("a.json", '{"prompt": "a", "prompt": "b"}', "a.json: 'prompt' comes twice; keep one"),
        ("a.json", '{"prompt": "a", "fps": NaN}', "a.json: NaN is no JSON; give a finite number"),
        ("a.json", '{"prompt": "a", "seed": 1e999}', "a.json, entry 1: seed is inf"),
        ("a.json", "[" * 100_000, "a.json: this is no JSON"),
        ("a.json", "1" * 10_000, "a.json: this is no JSON of orders"),
        ("a.json", "", "a.json: this is no JSON"),
        ("a.json", "[]", "a.json holds no order; write one"),
        ("a.jsonl", "\n\n", "a.jsonl holds no order"),
        ("a.yaml", "", "a.yaml holds no order"),
        ("a.yaml", "prompt: a\nprompt: b\n", "a.yaml: 'prompt' comes twice in the order at line 1; keep one"),
        ("a.yaml", "- prompt: a\n- prompt: [\n", "a.yaml, line 3: this is no YAML"),
        ("a.yaml", "prompt: !!python/object/apply:os.system ['true']\n", "a.yaml, line 1: this is no YAML"),
        ("a.yaml", "prompt: a\nframes: 2020-99-99\n", "a.yaml.* this is no YAML|frames is"),
        ("a.yaml", "prompt: no\n", "a.yaml, entry 1: prompt is False; it must be text"),
        ("a.yaml", "- prompt: a\n  seconds: 0x\n", "a.yaml, entry 1: seconds is '0x'"),
        ("a.yaml", "[" * 1500, "a.yaml.* this is no YAML"),
        ("a.yaml", LAUGHS, r"a.yaml, entry 1: prompt is \[\["),
        ("a.yaml", "prompt: &a [*a]\n", "a.yaml, entry 1: prompt is|no YAML"),
        ("a.txt", "prompt", r"a.txt: a request file ends in one of \.json, \.jsonl, \.yaml, \.yml"),
        ("a.json", b"\xff\xfe", "a.json is not UTF-8 text"),
        ("a.json", b" " * (2**20 + 1), "a.json has more than 1,048,576 bytes; split it"),
    ],
    ids=range(24),
)  # fmt: skip
def test_request_files_that_are_refused(tmp_path, name, text, match):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    begin = time.monotonic()
    with pytest.raises(RequestError, match=match) as caught:
        requests.read_orders(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert time.monotonic() - begin < 20


def test_request_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RequestError, match=r"not a file that is there|ends in one of"):
            requests.read_orders(path)


def test_request_files_hold_so_many_orders(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "MAX_ORDERS", 3)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' * 3)
    assert len(requests.read_orders(tmp_path / "a.jsonl")) == 3
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' * 4)
    with pytest.raises(RequestError, match=r"a\.jsonl holds more than 3 orders; split it"):
        requests.read_orders(tmp_path / "a.jsonl")
