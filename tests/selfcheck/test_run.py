"""The parts of a check: their lines come as they are found, and a crash or a hang of one is a line."""

import json
import sys

import pytest

from dinoforge.cli.main import main
from dinoforge.selfcheck import part, run
from dinoforge.selfcheck.lines import fail, not_here, ok
from dinoforge.selfcheck.settings import Settings

LINES = "from dinoforge.selfcheck.lines import fail, not_here, ok\n"
GOOD = LINES + "def check(settings):\n    yield ok('first', 'text', number=1)\n    yield not_here('second', 'reason')\n"
BAD = LINES + "def check(settings):\n    yield ok('first', 'text')\n    yield fail('second', 'wrong')\n"
CRASH = (
    LINES
    + "import os, signal\ndef check(settings):\n    yield ok('first', 'text')\n    print('last words', flush=True)\n"
    + "    os.kill(os.getpid(), signal.SIGKILL)\n"
)
HANG = LINES + "import time\ndef check(settings):\n    yield ok('first', 'text')\n    time.sleep(600)\n"
RAISE = LINES + "def check(settings):\n    yield ok('first', 'text')\n    raise ValueError('made up')\n"
NOISE = LINES + "def check(settings):\n    print('half a line', end='')\n    yield ok('first', 'text')\n"
NOTHING = "def check(settings):\n    yield from ()\n"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """``parts(name=code, …)``: the parts of the check, in place of its own."""
    start = (
        "import sys, importlib.util\n"
        "from dinoforge.selfcheck import part\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        file = {str(tmp_path)!r} + '/' + name.rpartition('.')[2] + '.txt'\n"
        "        import os\n"
        "        if name.startswith('dinoforge.selfcheck.') and os.path.exists(file):\n"
        "            from importlib.machinery import SourceFileLoader\n"
        "            return importlib.util.spec_from_loader(name, SourceFileLoader(name, file))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "part.main()\n"
    )
    (tmp_path / "made_up_part.py").write_text(start)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(run, "command", lambda name, settings: ["made_up_part", *part.command(name, settings)[1:]])

    def make(seconds: float = 120, **codes: str) -> None:
        for name, code in codes.items():
            (tmp_path / f"{name}.txt").write_text(code)
        for each in (part, run):
            monkeypatch.setattr(each, "PARTS", dict.fromkeys(codes, seconds))

    return make


def test_lines_of_all_parts_in_order(parts):
    parts(one=GOOD, two=GOOD)
    shown = []
    report = run.selfcheck(on_line=shown.append)
    assert list(report.lines) == shown
    assert [(line.name, line.status) for line in shown] == [("first", "ok"), ("second", "not here")] * 2
    assert report.passed
    assert report.summary().startswith("passed: 2 ok, 0 FAIL, 2 not here")
    assert shown[0].values == {"part": "one", "number": 1}
    assert shown[0].seconds is not None
    assert shown[1].seconds is None


def test_a_failure_fails_the_check_and_the_rest_goes_on(parts):
    parts(one=BAD, two=RAISE, three=GOOD)
    report = run.selfcheck()
    assert [line.status for line in report.lines] == ["ok", "FAIL", "ok", "FAIL", "ok", "not here"]
    assert report.lines[3].text == "ValueError: made up"
    assert not report.passed
    assert "Paste all of this into a bug report" in report.summary()


def test_a_crash_is_a_failure_with_the_last_words(parts):
    parts(one=CRASH, two=GOOD)
    report = run.selfcheck()
    first, crash, *rest = report.lines
    assert first.status == "ok"
    assert crash.status == "FAIL"
    assert "was ended by SIGKILL" in crash.text
    assert crash.details == ("last words",)
    assert [line.status for line in rest] == ["ok", "not here"]


def test_a_hang_is_a_failure_at_the_deadline(parts):
    parts(seconds=5, one=HANG)
    first, hang = run.selfcheck().lines
    assert first.status == "ok"
    assert hang.status == "FAIL"
    assert "had not ended after" in hang.text


def test_a_part_that_finds_nothing_is_a_failure(parts):
    parts(one=NOTHING)
    (line,) = run.selfcheck().lines
    assert line.status == "FAIL"


def test_what_libraries_print_is_no_finding(parts):
    parts(one=NOISE)
    (line,) = run.selfcheck().lines
    assert (line.name, line.status) == ("first", "ok")


def test_parts_need_the_device(parts):
    parts(environment=LINES + "def check(settings):\n    yield fail('device', 'gone')\n", two=GOOD)
    assert [(line.name, line.status) for line in run.selfcheck().lines] == [("device", "FAIL"), ("two", "not here")]


def test_only_some_parts(parts):
    parts(one=BAD, two=GOOD)
    assert {line.values["part"] for line in run.selfcheck(only=["two"]).lines} == {"two"}


def report_of(*lines):
    return run.SelfcheckResult(lines, Settings("auto", None, False, None), 1.0)


@pytest.mark.parametrize(("line", "code"), [(ok("a", ""), 0), (not_here("a", ""), 0), (fail("a", ""), 1)])
def test_exit_code_and_json(monkeypatch, capsys, line, code):
    def found(*, on_line, **options):
        on_line(line)
        return report_of(line)

    monkeypatch.setattr(run, "selfcheck", found)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["selfcheck", "--json"]) == code
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert out.count("\n") == 1
    assert told["passed"] is (code == 0)
    assert [each["name"] for each in told["lines"]] == ["a"]
    assert line.status in err
    assert main(["selfcheck"]) == code
    assert capsys.readouterr().out.splitlines()[0].startswith(line.status)


@pytest.mark.parametrize(
    "options", [["--device", "gpu"], ["--device", "cuda:x"], ["--nproc", "0"], ["--nproc", "two"], ["--only", "step"]]
)
def test_a_mistyped_option_is_told_at_once(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["selfcheck", *options])
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_device_that_is_not_here(monkeypatch):
    report = run.selfcheck(device="cuda:97", only=["environment", "memory"])
    by_name = {line.name: line for line in report.lines}
    assert by_name["device"].status == "FAIL"
    assert "cuda:97" in by_name["device"].text
    assert by_name["memory"].status == "not here"
    assert sys.version.split()[0] in by_name["versions"].text
