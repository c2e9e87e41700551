"""Images: what a row's message has beside its text, whatever its cell holds; what cannot be read costs nothing."""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import llmframe
from llmframe.budget import PART_TOKENS, TEMPLATE_TOKENS, Bound
from llmframe.errors import ConfigurationError, RowFailed, TemplateError
from llmframe.images import MOST_BYTES, CannotRead, attachments_of
from llmframe.prompts import Prompts, Unreadable
from tests.server import SimulatedServer

Ask = Callable[..., pd.DataFrame]
RED = np.zeros((4, 6, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
URL = "https://example.com/cat.png"


def encoded(form: str, pixels: Any = RED) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


PNG = encoded("PNG")
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "


@pytest.fixture
def ask(server: SimulatedServer) -> Ask:
    def complete(frame: pd.DataFrame, prompt: Any = "{text}", **keywords: Any) -> pd.DataFrame:
        defaults = {"model": "m", "base_url": server.base_url, "progress": False, "images": "photo"}
        return frame.llm.complete(prompt, **defaults | keywords)

    return complete


def rows(*cells: Any) -> pd.DataFrame:
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(len(cells))]})
    frame["photo"] = pd.Series([None] * len(cells), dtype=object)
    for number, cell in enumerate(cells):
        frame.at[number, "photo"] = cell
    return frame


def parts_sent(server: SimulatedServer) -> list[Any]:
    """Give the parts beside the text of each request, in the order of the rows."""
    contents = [request.body["messages"][-1]["content"] for request in server.requests()]
    return [content[1:] for content in sorted(contents, key=lambda content: content[0]["text"])]


def url_of(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image(url: str) -> Any:
    return {"type": "image_url", "image_url": {"url": url}}


# ---- what is sent


def test_urls_go_as_they_are_and_files_and_bytes_as_data_urls(
    server: SimulatedServer, ask: Ask, tmp_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(PNG)
    out = ask(rows(URL, str(tmp_path / "cat.png"), tmp_path / "cat.png", PNG, bytearray(PNG), url_of(PNG)))
    assert out["response_status"].tolist() == ["ok"] * 6
    assert parts_sent(server) == [[image(URL)], *[[image(url_of(PNG))]] * 5]


@pytest.mark.parametrize(
    ("form", "media_type"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("GIF", "image/gif"),
        ("WEBP", "image/webp"),
        ("BMP", "image/bmp"),
        ("TIFF", "image/tiff"),
    ],
)
def test_a_files_type_is_told_by_its_bytes_and_not_by_its_name(form: str, media_type: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.txt").write_bytes(encoded(form))
    (found,) = attachments_of(str(tmp_path / "wrong.txt"), "photo")
    assert found.part() == image(url_of(encoded(form), media_type))


def test_a_pdf_goes_as_a_file_and_sound_as_audio() -> None:
    pdf, wav, mp3 = (next(attachments_of(content, "c")) for content in (b"%PDF-1.7 ...", WAV, b"ID3\x04"))
    assert pdf.part()["file"] == {"filename": "document.pdf", "file_data": url_of(b"%PDF-1.7 ...", "application/pdf")}
    assert wav.part()["input_audio"] == {"data": base64.b64encode(WAV).decode(), "format": "wav"}
    assert mp3.part()["input_audio"]["format"] == "mp3"


@pytest.mark.parametrize(
    "pixels",
    [
        RED,
        RED[:, :, 0],
        RED[:, :, :1],
        RED / 255.0,
        (RED / 255.0).astype(np.float32),
        RED[::-1, ::2],
        np.dstack([RED, RED[:, :, 0]]),
        RED[:, :, 0] > 100,
    ],
)
def test_an_array_is_sent_as_the_picture_that_it_is(pixels: Any) -> None:
    (found,) = attachments_of(pixels, "photo")
    sent = base64.b64decode(found.part()["image_url"]["url"].removeprefix("data:image/png;base64,"))
    shown = np.asarray(Image.open(io.BytesIO(sent)))
    expected = np.squeeze(pixels) * (255 if pixels.dtype.kind in "bf" else 1)
    assert np.array_equal(shown, np.rint(expected).astype(np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "HSV", "I;16"])
def test_a_pil_image_of_any_mode_is_sent_as_a_png(mode: str) -> None:
    picture = Image.fromarray(RED).convert("L" if mode == "I;16" else mode)
    (found,) = attachments_of(picture.convert("I;16") if mode == "I;16" else picture, "photo")
    sent = base64.b64decode(found.part()["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(sent)).size == (6, 4)


def test_a_photograph_that_pil_opened_stays_a_jpeg() -> None:
    (found,) = attachments_of(Image.open(io.BytesIO(encoded("JPEG"))), "photo")
    assert found.part()["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_a_cell_may_hold_several_and_a_row_several_columns(server: SimulatedServer, ask: Ask) -> None:
    frame = rows([URL, PNG], np.array([URL, URL], dtype=object), [], {"bytes": PNG, "path": "cat.png"})
    frame["other"] = "http://a/b.jpg"
    ask(frame, images=["photo", "other"])
    last = image("http://a/b.jpg")
    png = image(url_of(PNG))
    assert parts_sent(server) == [[image(URL), png, last], [image(URL), image(URL), last], [last], [png, last]]


def test_a_prompt_that_is_the_same_for_all_is_enough_where_the_pictures_differ(
    server: SimulatedServer, ask: Ask
) -> None:
    out = ask(rows(URL, "https://example.com/dog.png", URL), "What is in the picture?")
    assert out["response"].tolist() == ["echo: What is in the picture?"] * 3
    assert server.stats().answered == 2


def test_pictures_stand_in_the_last_user_turn_of_a_list_of_messages(server: SimulatedServer, ask: Ask) -> None:
    prompt = [{"role": "system", "content": "Look."}, {"role": "user", "content": [{"type": "text", "text": "{text}"}]}]
    ask(rows(URL), prompt, examples=[("a", "b")])
    messages = server.requests()[-1].body["messages"]
    assert [message["content"] for message in messages[:3]] == ["Look.", "a", "b"]
    assert messages[3]["content"] == [{"type": "text", "text": "row 0"}, image(URL)]


def test_the_responses_api_takes_them_in_its_own_form(server: SimulatedServer, ask: Ask) -> None:
    ask(rows([PNG, b"%PDF-1.7"]), api="responses")
    text, picture, file = server.requests()[-1].body["input"][-1]["content"]
    assert text == {"type": "input_text", "text": "row 0"}
    assert picture == {"type": "input_image", "image_url": url_of(PNG), "detail": "auto"}
    assert file["type"] == "input_file"


def test_a_conversation_and_a_schema_go_with_pictures(server: SimulatedServer, ask: Ask) -> None:
    labels = ["cat", "dog"]
    one = ask(rows(PNG), schema=labels, history="talk")
    assert one["response"].cat.categories.tolist() == labels
    assert one["talk"][0][0]["content"][1] == image(url_of(PNG))
    two = ask(one, "Sure? {text}", schema=labels, history="talk", output="again", images=None)
    assert two["again_status"].tolist() == ["ok"]
    assert server.requests()[-1].body["messages"][0]["content"][1] == image(url_of(PNG))


def test_a_repaired_answer_is_asked_with_the_picture_again(server: SimulatedServer, ask: Ask) -> None:
    frame = rows(PNG)
    frame["text"] = "[[unfit_first=1]]"
    ask(frame, schema={"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    assert [request.body["messages"][0]["content"][1] for request in server.requests()] == [image(url_of(PNG))] * 2


def test_messages_and_estimate_send_nothing(server: SimulatedServer) -> None:
    frame = rows(PNG, None, "/no/such.png")
    shown = frame.llm.messages("{text}", images="photo")
    assert shown[0][0]["content"][1] == image(url_of(PNG))
    assert shown[1] is None
    assert shown[2] is None
    made = frame.llm.estimate("{text}", images="photo", model="gpt-4o-mini", max_tokens=5)
    assert (made.requests, made.skipped) == (1, 1)
    assert "images not counted" in made.prompts_by
    assert server.stats().received == 0


def test_an_example_of_a_job_takes_paths_from_a_file(server: SimulatedServer, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(PNG)
    rows(str(tmp_path / "cat.png"), "/no/such.png").to_parquet(tmp_path / "in.parquet")
    job = llmframe.run(
        tmp_path / "in.parquet",
        tmp_path / "out.parquet",
        "{text}",
        images="photo",
        model="m",
        base_url=server.base_url,
        progress=False,
    )
    assert job.counts == {"ok": 1, "failed": 1}
    assert parts_sent(server) == [[image(url_of(PNG))]]


def test_a_dask_frame_takes_them_as_a_pandas_frame_does(server: SimulatedServer, tmp_path: Path) -> None:
    dd = pytest.importorskip("dask.dataframe")
    frame = pd.DataFrame({"photo": [f"{URL}?{number}" for number in range(6)]})
    lazy = dd.from_pandas(frame, npartitions=2).llm.complete(
        "What is it?",
        images="photo",
        model="m",
        base_url=server.base_url,
        api_key="sk-test",
        checkpoint=str(tmp_path / "run"),
    )
    out = lazy.compute(scheduler="synchronous")
    assert out["response_status"].tolist() == ["ok"] * 6
    sent = [request.body["messages"][0]["content"][1]["image_url"]["url"] for request in server.requests()]
    assert sorted(sent) == frame["photo"].tolist()


def test_an_array_without_pillow_says_what_to_install(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'llmframe-pandas\[images\]'"):
        ask(rows(RED))


# ---- what cannot be read


def test_a_file_that_is_not_there_is_its_rows_error_and_costs_nothing(
    server: SimulatedServer, ask: Ask, tmp_path: Path
) -> None:
    out = ask(rows(PNG, "/no/such.png", b"text", b"", None, [URL, None], "s3://a/b.png", str(tmp_path), [pd.NA]))
    assert out["response_status"].tolist() == ["ok", "failed", "failed", "failed", "skipped", *["failed"] * 4]
    said = out["response_error"].tolist()
    assert said[1] == "the file '/no/such.png' of column 'photo' cannot be read: No such file or directory"
    assert "no picture, sound or document that is known" in said[2]
    assert "it is empty" in said[3]
    assert said[4] == "missing value in column 'photo'"
    assert "a URL that no endpoint fetches" in said[6]
    assert server.stats().received == 1


def test_a_file_that_comes_later_is_asked_then(server: SimulatedServer, ask: Ask, tmp_path: Path) -> None:
    path, store = tmp_path / "cat.png", tmp_path / "run"
    frame = rows(PNG, str(path))
    assert ask(frame, checkpoint=store)["response_status"].tolist() == ["ok", "failed"]
    path.write_bytes(encoded("PNG", RED // 2))
    assert ask(frame, checkpoint=store)["response_status"].tolist() == ["ok", "ok"]
    assert server.stats().answered == 2


def test_on_error_raise_stops_before_anything_is_asked(server: SimulatedServer, ask: Ask) -> None:
    with pytest.raises(RowFailed, match=r"row 1 \(label 1\) failed: the file '/no/such.png'") as stopped:
        ask(rows(PNG, "/no/such.png"), on_error="raise")
    assert stopped.value.frame is not None
    assert stopped.value.frame["response_status"].tolist() == ["pending", "failed"]
    assert server.stats().received == 0


class Moving(os.PathLike[str]):
    """A path to another file each time it is asked: a file that is written anew while its row waits."""

    def __init__(self, *paths: Path) -> None:
        self.paths = list(paths)

    def __fspath__(self) -> str:
        return str(self.paths.pop(0) if len(self.paths) > 1 else self.paths[0])


def test_a_file_that_changes_before_it_is_sent_is_not_kept_under_the_key_of_the_other(
    server: SimulatedServer, ask: Ask, tmp_path: Path
) -> None:
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    one.write_bytes(PNG)
    other.write_bytes(encoded("PNG", RED // 2))
    out = ask(rows(Moving(*[one] * 3, other), Moving(*[one] * 3, tmp_path / "gone.png")))
    assert out["response_status"].tolist() == ["failed", "failed"]
    assert "has changed since the run began" in out["response_error"][0]
    assert "No such file" in out["response_error"][1]
    assert server.stats().received == 0


def test_a_file_too_large_for_any_request_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(CannotRead, match=r"has 52,428,801 bytes, and a request takes 52,428,800 at most"):
        list(attachments_of(tmp_path / "large.png", "photo"))


def test_a_torn_picture_is_its_rows_error() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    torn = Image.open(io.BytesIO(encoded("JPEG", noise)[:2000]))
    (made,) = Prompts(rows(torn), "text", images="photo").render()
    assert isinstance(made, Unreadable)
    assert "cannot be read" in made.reason


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (5, "of type int"),
        (np.zeros((2, 2, 7), np.uint8), "shape"),
        (np.zeros((2, 2)) + 3, "float64"),
        (np.zeros(4, np.uint8), "shape"),
        ({"image": 1}, "of type dict"),
    ],
)
def test_a_value_that_is_nothing_of_the_kind_is_refused_before_anything_is_asked(
    server: SimulatedServer, ask: Ask, cell: Any, said: str
) -> None:
    with pytest.raises(TemplateError, match=rf"row 1 \(label 1\): column 'photo' of images= holds .*{said}"):
        ask(rows(PNG, cell))
    assert server.stats().received == 0


def test_the_names_of_columns_are_checked(ask: Ask) -> None:
    with pytest.raises(TemplateError, match="images=: no column 'phot'; did you mean 'photo'"):
        ask(rows(PNG), images="phot")
    with pytest.raises(TemplateError, match="images= is of type int"):
        ask(rows(PNG), images=5)
    with pytest.raises(ConfigurationError, match="images= is a column of a frame"):
        pd.Series(["a"]).llm.complete("{}", images="photo")
    with pytest.raises(ConfigurationError, match="images= is about a frame's columns"):
        llmframe.complete([[{"role": "user", "content": "a"}]], images="photo")


def test_a_row_without_a_picture_is_sent_without_one_where_missing_values_are_kept(
    server: SimulatedServer, ask: Ask
) -> None:
    out = ask(rows(URL, None), na="keep")
    assert out["response_status"].tolist() == ["ok", "ok"]
    assert server.requests()[-1].body["messages"][-1]["content"] in (
        "row 1",
        [{"type": "text", "text": "row 0"}, image(URL)],
    )


# ---- the key


def test_the_key_is_over_the_bytes_wherever_they_are(server: SimulatedServer, ask: Ask, tmp_path: Path) -> None:
    frame, store = rows(PNG), tmp_path / "run"
    ask(frame, checkpoint=store)
    for name in ("one.png", "moved.png"):
        (tmp_path / name).write_bytes(PNG)
        frame = rows(str(tmp_path / name))
        ask(frame, checkpoint=store)
    assert server.stats().answered == 1
    (tmp_path / "moved.png").write_bytes(PNG + b"\0")
    ask(frame, checkpoint=store)
    assert server.stats().answered == 2


def keyed(cell: Any) -> Any:
    ((found,),) = [list(attachments_of(cell, "photo"))]
    return found.named()["image_url"]["url"]


def test_the_key_of_a_picture_in_memory_is_over_its_pixels_and_never_changes() -> None:
    golden = "sha256:ccaeb74e027cddba1fa4d1a6c59050b190cf118eb2d39724ca7f0054ae7b5710"
    assert keyed(RED) == keyed(Image.fromarray(RED)) == keyed(RED / 255.0) == golden
    assert keyed(RED[::-1] // 2) != golden
    assert keyed(np.zeros((2, 8), np.uint8)) != keyed(np.zeros((4, 4), np.uint8))


# ---- the budget


def test_the_worst_case_of_a_picture_is_not_that_of_its_bytes_as_text() -> None:
    bound = Bound(completion_tokens=0)
    body = b'{"messages":[{"content":[{"type":"image_url","image_url":{"url":"%s"}}]}]}'
    most = bound(body % (b"data:image/png;base64," + b"A" * 1_000_000)).tokens
    assert most < TEMPLATE_TOKENS + 200 + dict(PART_TOKENS)[b'"image_url":']
    text = b'{"content":"\\"url\\":\\"data:image/png;base64,%s"}' % (b"A" * 1000)
    assert bound(text).tokens == len(text) + TEMPLATE_TOKENS
    assert bound(b'{"text":"data:image/png;base64,AAAA"}').tokens == 37 + TEMPLATE_TOKENS
