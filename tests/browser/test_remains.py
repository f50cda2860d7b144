"""What remains of a run in a saved notebook, with nothing behind it any more."""

from __future__ import annotations

import subprocess
import sys

import nbformat
from playwright.sync_api import expect
from sheets import Sheet
from test_panel import NET, START, TRAIN


def test_a_saved_notebook_shows_the_result(open_notebook):
    """Table and chart, in a kernel that knows nothing of it and as an exported page; no script, no widget."""
    with open_notebook("saved.ipynb", START, NET, f"{TRAIN} --epochs 3") as sheet:
        sheet.run_all()
        expect(sheet.static).to_contain_text("finished")
        sheet.save()
        page, lab = sheet.page, sheet.lab
        lab.end_kernels()
        again = Sheet(page, lab, "saved.ipynb")
        expect(again.static).to_contain_text("Sequential (5.26 k parameters) on dp=2")
        expect(again.static.locator("table").first).to_contain_text("val_accuracy")
        chart = again.static.locator("img").first
        assert chart.evaluate("image => image.complete && image.naturalWidth") == 480
        again.shot("reopened")

        path = lab.folder / "saved.ipynb"
        outputs = [out for cell in nbformat.read(path, 4).cells for out in cell.outputs if "data" in out]
        kinds = {kind for out in outputs for kind in out["data"]}
        assert {"text/html", "text/plain"} == kinds
        assert not any("<script" in str(out["data"].get("text/html")) for out in outputs)
        subprocess.run(
            [sys.executable, "-m", "nbconvert", "--to", "html", "--log-level", "WARN", str(path)], check=True
        )
        page.goto(path.with_suffix(".html").as_uri())
        expect(page.locator("div.nbdist")).to_contain_text("finished")
        assert page.locator("div.nbdist img").first.evaluate("image => image.naturalWidth") == 480
        page.screenshot(path=str(path.with_suffix(".png")))


def test_a_notebook_saved_in_the_middle_shows_the_last_checkpoint(open_notebook):
    """Beside the live panel lies what was known at the last checkpoint, for whoever opens it without a kernel."""
    train = f"{TRAIN} --epochs 100000000 --checkpoint ck --checkpoint-every 1s"
    with open_notebook("middle.ipynb", START, NET, train) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        page, path = sheet.page, sheet.lab.folder / "middle.ipynb"

        def kept():
            sheet.save()
            (output,) = nbformat.read(path, 4).cells[-1].outputs
            return output["data"]

        data = kept()
        while "checkpoint of step" not in data["text/html"]:
            page.wait_for_timeout(1000)
            data = kept()
        assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} == set(data)
        sheet.expect_step_after(sheet.step())
        sheet.button("Stop").click()
        expect(sheet.static).to_contain_text("stopped")


def test_a_run_is_displayed_again(open_notebook):
    """Its name in a later cell shows the same panel, live; both give way to what remains."""
    with open_notebook("again.ipynb", START, NET, f"{TRAIN} --epochs 100000000 --background -o run", "run") as sheet:
        sheet.run_all()
        panels = sheet.page.locator(".nbdist-panel")
        expect(panels).to_have_count(2)
        panels.last.get_by_role("button", name="Stop", exact=True).click()
        expect(sheet.page.locator("div.nbdist", has_text="stopped")).to_have_count(2)
        expect(panels).to_have_count(0)
