"""The report page in a real browser, over its debugging pipe: filters, slider, keyboard, no error."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from evaluation.report import write_report

SECONDS = 60  # a busy machine is slow to start a browser
TRUTH = [[1, 2, 3], [4, 5, 6]]


class Browser:
    """A headless Chromium behind two pipes that carry JSON messages, each ended by a zero byte."""

    def __init__(self, executable: str, profile: Path):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        far = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_browser, from_browser)]

        def as_three_and_four() -> None:
            for fd, wanted in zip(far, (3, 4), strict=True):
                os.dup2(fd, wanted)

        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
        ]
        self._process = subprocess.Popen(
            [
                executable,
                *flags,
                "--remote-debugging-pipe",
                "--window-size=1280,1000",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            preexec_fn=as_three_and_four,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (to_browser, from_browser, *far):
            os.close(fd)
        self._buffer, self._number, self._session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """The result of a protocol method; events that arrive before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        reply = self._until(lambda received: received.get("id") == self._number)
        assert "error" not in reply, reply
        return reply["result"]

    def open(self, page: Path) -> None:
        """Load a page from the file system."""
        self.events = []
        self.call("Page.navigate", url=page.as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._until(lambda received: received.get("method") == "Page.loadEventFired")

    def value(self, expression: str):
        """What a JavaScript expression gives in the page."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up, wherever the focus is."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
        text = {} if key in codes else {"text": key}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=codes.get(key, ord(key[0].upper())),
                **text,
            )

    def problems(self) -> list[dict]:
        """Errors and warnings of the console since the page was opened."""
        self.value("0")
        loud = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
        return [event for event in self.events if event.get("method") in loud]

    def screenshot(self, path: Path, dark: bool = False) -> None:
        """The visible part of the page as a PNG."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _until(self, wanted) -> dict:
        deadline = time.monotonic() + SECONDS
        while True:
            while b"\0" in self._buffer:
                message, _, self._buffer = self._buffer.partition(b"\0")
                received = json.loads(message)
                if "id" not in received:
                    self.events.append(received)
                if wanted(received):
                    return received
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser closed its pipe"
            self._buffer += data


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine")
    browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def answer(grid, correct, votes=5):
    return {"grid": grid, "votes": votes, "q": 0.8, "correct": correct}


def record(task, candidates, rank, steps=None):
    right = None if rank == "unknown" else rank == 1
    return {
        "task": task,
        "query": 0,
        "protocol": "inductive",
        "status": "unlabelled" if right is None else "scored",
        "num_votes": 8,
        "top1_correct": right,
        "rank_of_truth": None if rank == "unknown" else rank,
        "candidates": candidates,
        **({"steps": steps} if steps else {}),
    }


def steps_to(truth, count=5):
    """An empty answer, an answer of another size, then cell after cell the truth."""
    steps = [{"grid": [], "q": 0.01, "halted": False}, {"grid": [[0]], "q": 0.05, "halted": False}]
    flat = np.zeros(np.size(truth), int)
    for number in range(count - 2):
        known = np.size(truth) if number == count - 3 else number + 1
        flat[:known] = np.ravel(truth)[:known]
        steps.append(
            {
                "grid": flat.reshape(np.shape(truth)).tolist(),
                "q": 0.2 * (number + 1),
                "halted": number == count - 3,
            }
        )
    return steps


def results(**changes):
    score = {"control": "none", "metric": "ARC/pass@1", "value": 0.5, "ci_low": 0.1, "ci_high": 0.9, "n": 4}
    counts = {
        "tasks": 4,
        "queries": 4,
        "scored": 3,
        "no_prediction": 0,
        "unlabelled": 1,
        "answer_exceeds_canvas": 0,
    }
    return {
        "protocol": "inductive",
        "split": "test",
        "num_views": 8,
        "seed": 0,
        "scores": [score],
        "counts": counts,
        **changes,
    }


def puzzle(answer=TRUTH):
    query = {"input": [[1, 1], [0, 2]], **({"output": answer} if answer else {})}
    return {"train": [{"input": [[5]], "output": [[6]]}], "test": [query]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A right task, a wrong one, one whose right answer stands second, one with an unknown answer."""
    wrong = [[9, 9, 9], [9, 9, 9]]
    records = [
        record("right", [answer(TRUTH, True)], 1, steps_to(TRUTH)),
        record("wrong", [answer(wrong, False), answer([[1]], False, 2)], None, steps_to(wrong)),
        record("late", [answer(wrong, False), answer(TRUTH, True, 3)], 2),
        record("open", [answer(TRUTH, None)], "unknown", steps_to(TRUTH, 3)),
    ]
    puzzles = {"right": puzzle(), "wrong": puzzle(), "late": puzzle(), "open": puzzle(None)}
    metrics = [
        {"step": step, "train/lm_loss": 2 / step, "train/exact_accuracy": None if step < 3 else step / 1000}
        for step in range(1, 1000)
    ]
    contexts = {record["task"]: np.random.default_rng(i).normal(size=6) for i, record in enumerate(records)}
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, results(), records, puzzles, metrics, contexts)
    return path


def shown(browser) -> list[str]:
    return browser.value("cards.filter(card => !card.hidden).map(card => card.task)")


def test_the_filters_choose_right_wrong_and_close_tasks(browser, page):
    browser.open(page)
    for name, tasks in (
        ("right", ["right"]),
        ("wrong", ["wrong", "late"]),
        ("close", ["late"]),
        ("unscored", ["open"]),
    ):
        browser.value(f"document.querySelector('#filters button[data-name={name}]').click()")
        assert shown(browser) == tasks, name
    browser.value("document.querySelector('#filters button[data-name=all]').click()")
    browser.press("f")
    assert shown(browser) == ["right"]
    assert browser.problems() == []


def test_the_slider_moves_by_keyboard_and_tells_each_step(browser, page):
    browser.open(page)
    browser.value("goTo(cards[0])")
    browser.value("cards[0].querySelector('input[type=range]').focus()")
    told = "cards[0].querySelector('output').textContent"
    assert (
        "Step 4 of 0 to 4 · q 0.600 · the model stops here · 2 × 3 · 6 of 6 cells right · 4 cells changed"
        in browser.value(told)
    )
    browser.press("ArrowLeft")
    assert "Step 3" in browser.value(told) and "2 of 6 cells right · 1 cell changed" in browser.value(told)
    for _ in range(2):
        browser.press("ArrowLeft")
    assert "Step 1" in browser.value(told) and "other size than the truth" in browser.value(told)
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert "Step 0" in browser.value(told), "the slider ends where the steps begin"
    browser.press("ArrowRight")
    assert "Step 1" in browser.value(told)
    assert browser.value("document.activeElement.type") == "range", (
        "arrows on the slider do not move between tasks"
    )
    browser.value("drain(cards[0]); fill(cards[0])")
    assert "Step 1" in browser.value(told), "a card that is drawn again stands where it stood"
    assert browser.problems() == []


def test_cells_are_framed_right_wrong_and_changed(browser, page):
    browser.open(page)
    browser.value("goTo(cards[0])")
    browser.value(
        "var slider = cards[0].querySelector('input[type=range]'); slider.value = 3; slider.oninput()"
    )
    read = """x => { const { size, line, step } = measures(24);
        const pen = cards[0].querySelector('.refinement canvas').getContext('2d');
        const rgba = inset => pen.getImageData(line + x * step + inset, line + size / 2, 1, 1).data;
        const at = inset => [...rgba(inset).slice(0, 3)];
        return [at(0), at(Math.max(1, Math.round(size / 8)) + line)]; }"""
    right, wrong, changed = (
        list(bytes.fromhex(browser.value(f"RING.{name}")[1:])) for name in ("right", "wrong", "changed")
    )
    ring = [browser.value(f"({read})({x})") for x in range(3)]
    assert [outer for outer, _ in ring] == [right, right, wrong]
    assert [inner == changed for _, inner in ring] == [False, True, False]


def test_curves_and_map_are_drawn_and_the_map_leads_to_a_task(browser, page):
    browser.open(page)
    assert browser.value("[...document.querySelectorAll('#panels code')].map(code => code.textContent)") == [
        "train/lm_loss",
        "train/exact_accuracy",
    ]
    assert browser.value("document.querySelector('#panels polyline').points.numberOfItems") == 400
    assert browser.value("[...document.querySelectorAll('.map-spot')].map(spot => spot.textContent)") == [
        "right",
        "wrong",
        "late",
        "open",
    ]
    browser.value("setFilter('right'); document.querySelectorAll('.map-spot')[2].onclick()")
    assert browser.value("document.activeElement.task") == "late"
    assert browser.problems() == []


def test_a_page_of_one_task_is_called_so(browser, tmp_path):
    path = tmp_path / "page.html"
    about = {"task": "mine", "protocol": "inductive", "num_views": 2, "seed": 0, "notes": ["a note"]}
    write_report(path, about, [record("mine", [answer(TRUTH, True)], 1, steps_to(TRUTH))], {"mine": puzzle()})
    browser.open(path)
    heading = browser.value("document.querySelector('header').innerText")
    assert (
        heading.startswith("Answers to task mine")
        and "a note" in heading
        and "split" not in heading
        and "No scores" not in heading
    )
    assert browser.problems() == []


def test_several_subsets_have_their_scores_below_all_of_them(browser, tmp_path):
    path = tmp_path / "report.html"
    (score,) = results()["scores"]
    by_subset = {name: [score | {"value": value, "n": 2}] for name, value in (("rules", 1.0), ("arc", 0.0))}
    write_report(
        path, results(by_subset=by_subset), [record("mine", [answer(TRUTH, True)], 1)], {"mine": puzzle()}
    )
    browser.open(path)
    headings = browser.value(
        "[...document.querySelectorAll('#scores thead th:first-child')].map(cell => cell.innerText)"
    )
    assert headings == ["ARC/pass", "Subset rules", "Subset arc"]
    rows = browser.value(
        "[...document.querySelectorAll('#scores tr.model')].map(row => row.innerText.replace(/\\s+/g, ' '))"
    )
    assert [row.split()[1] for row in rows] == ["50.0%", "100.0%", "0.0%"] and browser.problems() == []


def test_a_thousand_tasks_with_steps_open_at_once(browser, tmp_path):
    rng = np.random.default_rng(0)
    records, puzzles = [], {}
    steps = {
        tuple(map(tuple, truth)): steps_to(truth, 16) for truth in rng.integers(0, 10, (10, 12, 12)).tolist()
    }
    for number in range(1000):
        truth = list(steps)[number % 10]
        records.append(record(f"task{number:04d}", [answer(truth, True)], 1, steps[truth]))
        puzzles[f"task{number:04d}"] = puzzle(truth)
    path = tmp_path / "report.html"
    contexts = {one["task"]: rng.normal(size=8) for one in records}
    write_report(path, results(), records, puzzles, (), contexts)
    browser.open(path)
    assert len(shown(browser)) == 1000
    assert 0 < browser.value("document.querySelectorAll('canvas').length") < 60, (
        "cards far below the window are not drawn"
    )
    browser.value("cards[700].scrollIntoView()")
    browser.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 200)))")
    assert browser.value("cards[700].querySelectorAll('canvas').length") > 0
    assert browser.value("document.querySelectorAll('canvas').length") < 120
    assert browser.problems() == []
