"""The progress bar of long work, with and without rich, on a terminal and elsewhere."""

import sys

import pytest

from flowvi.guidance import Watch
from flowvi.progress import Bar


@pytest.fixture(params=["rich", "tqdm"])
def drawn_by(request, monkeypatch):
    if request.param == "tqdm":
        monkeypatch.setitem(sys.modules, "rich.progress", None)  # as if it were not installed
    return request.param


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_what_is_counted_and_ends(drawn_by, terminal, monkeypatch, capsys):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the stream for a terminal; tqdm does not look
    assert list(Bar(range(30), unit="steps", disable=False, desc="SVI")) == list(range(30))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "SVI" in shown.err
    assert "30/30" in shown.err
    assert shown.err.endswith("\n") or shown.err.endswith("\x1b[?25h")  # the cursor is back
    assert ("━" in shown.err) == (drawn_by == "rich")


def test_a_file_gets_one_line(drawn_by, monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr("flowvi.guidance.perf_counter", lambda: next(clock))
    with Watch(20.0, progress_bar=True) as watch:
        for i in range(10):
            watch.show(f"RP at x{i}")
            watch.left()
    shown = capsys.readouterr().err
    assert len(shown.replace("\r", "\n").split()) < 20  # words, of one line
    assert len(shown.strip().splitlines()) == 1
    assert "RP at x9" in shown
    assert "RP at x8" not in shown
    assert ": :" not in shown


def test_a_notebook_without_widgets_gets_the_bar_of_tqdm(monkeypatch, capsys):
    rich = pytest.importorskip("rich.console")
    monkeypatch.setattr(rich, "_is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr("flowvi.progress.find_spec", lambda name: None)
    with Watch(2.0, progress_bar=True) as watch:
        watch.show("RP at x")
        shown = capsys.readouterr().err
    assert "RP at x" in shown  # while it runs
    assert "0/2 s" in shown


def test_a_bar_ends_with_an_error(drawn_by, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    streams = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError):
        [1 // (i - 7) for i in Bar(range(30), unit="steps", disable=False, desc="SVI")]
    assert (sys.stdout, sys.stderr) == streams  # on a terminal rich replaces them, to print above the bar
    assert "7/30" in capsys.readouterr().err


def test_a_countdown_shows_what_is_done_now(drawn_by, capsys):
    with Watch(0.0, progress_bar=True) as clock:
        clock.show("RP at x")
        clock.left()
    assert "RP at x" in capsys.readouterr().err


def test_without_a_bar_nothing_is_shown(drawn_by, capsys):
    with Watch(0.0, progress_bar=False) as clock:
        clock.show("RP at x")
        clock.left()
    assert list(Bar(range(3), unit="steps", disable=True)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
