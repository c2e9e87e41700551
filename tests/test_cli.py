"""The command line: what it prints, what it leaves behind, and what its exit status says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from llmframe.cli import main
from llmframe.cli_demo import agreement
from tests.server import SimulatedServer

REVIEWS = [
    ("it is a joy to use. [[label=positive]]", 3.0),
    ("it broke on the first day. [[label=negative]]", -2.5),
    ("works, mostly. [[label=positive]]", 0.2),
    ("i sent it back. [[label=positive]]", -1.5),
]


@pytest.fixture
def here(tmp_path: Path, server: SimulatedServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with reviews in it, and an endpoint to label them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    (tmp_path / "data").mkdir()
    pd.DataFrame(REVIEWS, columns=["review", "human_score"]).to_parquet("data/reviews.parquet")
    return tmp_path


def demo(*arguments: str) -> int:
    return main(["demo", "--model", "m", *arguments])


def test_the_demo_labels_the_reviews_and_compares_them_with_people(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo() == 0
    out = capsys.readouterr().out
    assert "4 rows, 4 requests" in out
    assert "2 of the 3 reviews with |human_score| >= 1.5 are labelled as people did (67 %)" in out
    assert "always 'negative': 2 (67 %)" in out
    labelled = pd.read_parquet("reviews-labelled.parquet")
    assert labelled["sentiment"].tolist() == ["positive", "negative", "positive", "positive"]
    assert labelled["sentiment_status"].tolist() == ["ok"] * 4


def test_a_second_demo_is_answered_from_the_checkpoint_and_says_so(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo() == 0
    first = Path("reviews-labelled.parquet").read_bytes()
    assert demo() == 0
    assert "all 4 rows were answered from runs/demo" in capsys.readouterr().out
    assert server.stats().answered == 4
    assert Path("reviews-labelled.parquet").read_bytes() == first


def test_rows_says_how_many_reviews_are_labelled(here: Path, server: SimulatedServer) -> None:
    assert demo("--rows", "2", "--out", "two.parquet") == 0
    assert len(pd.read_parquet("two.parquet")) == server.stats().answered == 2


def test_reviews_that_are_not_there_are_wrong_use_in_one_line(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data/reviews.parquet").unlink()
    assert demo() == 2
    err = capsys.readouterr().err
    assert err.startswith("llmframe: there is no data/reviews.parquet here; ")
    assert "--data" in err
    assert err.count("\n") == 1
    assert server.stats().received == 0


def test_a_file_that_is_no_parquet_is_wrong_use(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("reviews.csv").write_text("review,human_score\n")
    assert demo("--data", "reviews.csv") == 2
    assert "llmframe: reviews.csv cannot be read as parquet" in capsys.readouterr().err


def test_a_parquet_file_without_reviews_is_wrong_use(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"text": ["fine"]}).to_parquet("other.parquet")
    assert demo("--data", "other.parquet") == 2
    assert "no column 'review'" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_found_before_anything_is_asked(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo("--out", "nowhere/out.parquet") == 2
    assert "llmframe: nowhere/out.parquet cannot be written" in capsys.readouterr().err
    assert server.stats().received == 0


@pytest.mark.parametrize("rows", ["0", "-1", "many"])
def test_a_count_of_rows_that_is_none_is_wrong_use(rows: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demo("--rows", rows)
    assert caught.value.code == 2
    assert "--rows" in capsys.readouterr().err


def test_no_verb_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "VERB" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["", "run", "batch", "batch submit", "inspect", "export", "demo", "completion"])
def test_the_help_fits_a_screen(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) <= 50


def test_the_help_says_where_key_endpoint_and_model_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "LLMFRAME_MODEL", "VERB --help"))


def test_a_row_that_fails_is_in_the_exit_status_and_on_the_screen(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reviews = [*REVIEWS, ("no model reads this. [[status=400]]", 2.0)]
    pd.DataFrame(reviews, columns=["review", "human_score"]).to_parquet("data/reviews.parquet")
    assert demo() == 3
    assert "400" in capsys.readouterr().out
    assert pd.read_parquet("reviews-labelled.parquet")["sentiment_status"].tolist() == ["ok"] * 4 + ["failed"]


def test_a_run_that_was_stopped_says_so_and_the_same_command_goes_on(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.configure(status_all=401)
    assert demo() == 4
    assert capsys.readouterr().err.startswith("llmframe: ")
    assert not Path("reviews-labelled.parquet").exists()
    server.configure()
    assert demo() == 0


def test_scores_that_are_all_near_zero_are_compared_with_nothing() -> None:
    frame = pd.DataFrame({"human_score": [0.5, -1.0], "sentiment": ["positive", "negative"]})
    assert agreement(frame) == "none of these reviews has |human_score| >= 1.5"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_can_complete_every_verb_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("inspect", "export", "max-cost", "prompt-file", "dask"))


def test_bash_completes_an_option_that_the_help_only_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    main(["completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    asked = 'COMP_WORDS=(llmframe run --rp); COMP_CWORD=2; COMP_LINE="llmframe run --rp"; COMP_POINT=17'
    ask = f'source {script}; {asked}; _shtab_llmframe; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run([bash, "-c", ask], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "--rpm", done.stderr


def test_python_m_is_the_command_too() -> None:
    shown = [
        subprocess.run([sys.executable, "-m", name, "run", "--help"], capture_output=True, text=True, check=True).stdout
        for name in ("llmframe", "llmframe.cli")
    ]
    assert shown[0] == shown[1] != ""
