"""The output of ranks, labelled and merged; and the status line."""

from __future__ import annotations

import pytest

from nbdist.notebook.output import RankPrinter, StatusLine, label, merge, show_rich


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        ({0: "a\n", 1: "a\n"}, ["[0-1] a"]),
        ({0: "a\n", 1: "b\n"}, ["[0] a", "[1] b"]),
        ({0: "a\n", 1: "b\n", 2: "a\n", 3: "a\n"}, ["[0,2-3] a", "[1] b"]),
        ({0: "x\na\ny\n", 1: "x\nb\ny\n"}, ["[0-1] x", "[0] a", "[1] b", "[0-1] y"]),
        ({0: "x\na\nb\n", 1: "x\nc\nd\n"}, ["[0-1] x", "[0] a", "[0] b", "[1] c", "[1] d"]),
        ({0: "x\n", 1: "x\ny\n"}, ["[0-1] x", "[1] y"]),
        ({0: "a\n", 1: ""}, ["[0] a"]),
        ({1: "only\n"}, ["[1] only"]),
        ({0: "no end", 1: "no end\n"}, ["[0-1] no end"]),
        ({0: "\n\n", 1: "\n\n"}, ["[0-1] ", "[0-1] "]),
        ({0: "10%\r50%\r100%\ndone\n"}, ["[0] 100%", "[0] done"]),
        ({0: "10%\r90%", 1: "\r10%\r90%\r"}, ["[0-1] 90%"]),
        ({0: "dos\r\nline\r\n"}, ["[0] dos", "[0] line"]),
        ({0: "one\x0cline\x0b\x85\u2028still\n"}, ["[0] one\x0cline\x0b\x85\u2028still"]),
        ({}, []),
    ],
    ids=["the same", "different", "in groups", "different in the middle", "blocks stay together", "one says more",
         "one is silent", "one rank", "no end", "empty lines", "a progress bar", "unfinished progress bars",
         "line ends of DOS", "only line feeds end a line", "nothing"],
)  # fmt: skip
def test_lines_are_labelled_and_shown_once(texts, lines):
    """A line of all ranks is printed once; an overwritten line of a rank is not printed at all."""
    assert merge(texts) == lines


def test_labels_name_ranks_briefly():
    """Neighbouring ranks become a range."""
    assert [label([0]), label([0, 1, 2, 5])] == ["[0]", "[0-2,5]"]


def test_the_printer_prints_complete_lines_as_they_come_and_the_rest_at_the_end(capsys):
    """Nothing twice, nothing lost, each stream to its own."""
    texts = {"stdout": {0: "", 1: ""}, "stderr": {0: "", 1: ""}}
    printer = RankPrinter(lambda stream: texts[stream], interval_s=0)
    seen = []
    for out, err in (("a\nb", ""), ("a\nbc\nd", "w\n"), ("a\nbc\nd", "w\n"), ("a\nbc\ndone", "w\n")):
        texts["stdout"] = {0: out, 1: out}
        texts["stderr"] = {0: err, 1: ""}
        printer.poll()  # sees what is new
        printer.poll()  # prints it: the others have had their time to say the same
        seen.append(tuple(capsys.readouterr()))
    assert seen == [("[0-1] a\n", ""), ("[0-1] bc\n", "[0] w\n"), ("", ""), ("", "")]
    printer.flush()
    assert tuple(capsys.readouterr()) == ("[0-1] done\n", "")


def test_the_printer_collects_lines_for_a_while(capsys):
    """So that equal lines of ranks that print them a little later are merged."""
    texts = {0: "same\n", 1: ""}
    printer = RankPrinter(lambda stream: texts if stream == "stdout" else {}, interval_s=60)
    printer.poll()
    texts[1] = "same\n"
    printer.poll()
    assert capsys.readouterr().out == ""
    printer.flush()
    assert capsys.readouterr().out == "[0-1] same\n"


def test_equal_results_are_shown_once(capsys):
    """Plain text follows its label; text of several lines is below it."""
    show_rich({0: {"text/plain": "1"}, 1: {"text/plain": "2"}, 2: {"text/plain": "1"}}, "Out")
    assert capsys.readouterr().out == "[0,2] Out: 1\n[1] Out: 2\n"
    show_rich({0: {"text/plain": "a\nb"}}, "Out")
    assert capsys.readouterr().out == "[0] Out:\na\nb\n"


def test_a_terminal_shows_the_end_only(capsys):
    """A status that cannot be replaced later is not printed."""
    line = StatusLine(live=False)
    line.report("starting")
    assert capsys.readouterr().out == ""
    line.end("started")
    assert capsys.readouterr().out == "started\n"
