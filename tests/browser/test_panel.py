"""The panel as a user sees it: in a real browser, beside a real kernel with real engines."""

from __future__ import annotations

import os
import re
import signal

import pytest
from playwright.sync_api import expect
from sheets import opened

START = """%load_ext nbdist
import torch
from torch import nn
%dist_start -n 2 --device cpu"""
NET = """torch.manual_seed(0)
x, w = torch.randn(4000, 32), torch.randn(32, 8)
y = (x @ w).argmax(1)
model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 8))"""
TRAIN = (
    "%dist_train model (x, y) --loss cross_entropy --lr 0.001 --batch-size 64 --val (x[:500], y[:500]) "
    "--metric accuracy"
)
ENDLESS = f"{TRAIN} --epochs 100000000"


def test_bars_move_and_rows_stand_while_the_cell_runs(open_notebook):
    """How far, how fast, how long still, and who does what; all of it within one screen."""
    with open_notebook("live.ipynb", START, NET, ENDLESS) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        sheet.expect_busy()
        step = sheet.step()
        sheet.expect_step_after(step)
        panel = sheet.panel
        expect(panel).to_have_attribute("aria-label", re.compile("Sequential .* on dp=2"))
        expect(panel.locator("tr[data-rank]")).to_have_count(2)
        for rank in range(2):
            expect(panel.locator(f"tr[data-rank='{rank}']")).to_have_attribute(
                "data-state", re.compile("running|waiting|slow|evaluating")
            )
        expect(panel.get_by_role("progressbar")).to_have_attribute("aria-valuenow", re.compile(r"\d+"))
        expect(panel.locator("svg[role=img]").first).to_be_visible()
        expect(panel.locator("dl")).to_contain_text(
            re.compile("step.*epoch.*loss.*samples/s.*elapsed.*left", re.DOTALL)
        )
        expect(panel.locator("dd").last).to_contain_text(re.compile("about|a few"))
        shares = panel.locator("tr[data-rank='0'] .nbdist-times")
        expect(shares).to_have_attribute(
            "aria-label", re.compile(r"compute \d+ %, communication \d+ %, data \d+ %, idle \d+ %")
        )
        box = panel.bounding_box()
        assert box["height"] < 560
        sheet.expect_step_after(5000)
        sheet.shot("live")
        sheet.button("Stop").click()
        expect(sheet.static).to_be_visible()


NETS = """torch.manual_seed(0)
points = torch.randn(4000, 2)
nets = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1)), nn.Linear(4, 2)
adam = {name: torch.optim.Adam(net.parameters()) for name, net in zip(("critic", "generator"), nets)}"""
IN_TURNS = """%%dist_train nets points --optimizer adam --epochs 100000000 --batch-size 64
from nbdist import update
critic, generator = model
fake = generator(torch.randn(len(batch), 4))
update(nn.functional.softplus(critic(fake.detach()) - critic(batch)).mean(), "critic")
update(-critic(fake).mean(), "generator")
log = {"spread": fake.std(0).mean()}"""


def test_what_a_step_logs_has_charts_of_its_own(open_notebook):
    """The losses of each optimizer, and the step's own numbers; they stay when the run has ended."""
    with open_notebook("own.ipynb", START, NETS, IN_TURNS) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        sheet.expect_step_after(2000)
        for name in ("loss_critic", "loss_generator", "spread"):
            expect(sheet.panel.locator(f"svg[aria-label*='{name}']").first).to_be_visible()
        assert sheet.panel.bounding_box()["height"] < 560
        sheet.shot("own-charts")
        sheet.button("Stop").click()
        expect(sheet.static).to_be_visible()
        for name in ("loss_critic", "loss_generator", "spread"):
            expect(sheet.static.locator(f"img[alt*='{name}']").first).to_be_visible()


def test_the_front_end_gets_at_most_10_messages_a_second(open_notebook):
    """However quick the steps are: by the times at which the kernel has sent them."""
    with open_notebook("traffic.ipynb", START, NET, ENDLESS) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        del sheet.sent_s[:]
        while len(sheet.sent_s) < 41:
            sheet.page.wait_for_timeout(20)
        assert 40 / (sheet.sent_s[40] - sheet.sent_s[0]) < 10.5
        sheet.button("Stop").click()
        expect(sheet.static).to_be_visible()


def test_every_control_works_while_the_cell_runs(open_notebook):
    """Pause, another rate by hand and by button, a checkpoint, Resume, Stop; and a mistake is answered."""
    with open_notebook("controls.ipynb", START, NET, ENDLESS) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        panel = sheet.panel
        sheet.button("Pause").click()
        sheet.expect_state("paused")
        sheet.expect_busy()
        step = sheet.step()
        rate = panel.get_by_role("textbox", name="Learning rate")
        expect(rate).to_have_value("0.001")
        rate.fill("fast")
        rate.press("Enter")
        refused = "a learning rate of 'fast' is not possible: use a positive number."
        expect(panel.locator(".nbdist-hint")).to_have_text(refused)
        rate.fill("0.004")
        rate.press("Enter")
        expect(panel.locator(".nbdist-events")).to_contain_text(f"learning rate 0.004 after step {step:,}")
        expect(panel.locator(".nbdist-hint")).to_have_text("")
        sheet.button("Halve learning rate").click()
        expect(rate).to_have_value("0.002")
        sheet.button("Double learning rate").click()
        expect(rate).to_have_value("0.004")
        sheet.button("Checkpoint").click()
        expect(panel.locator(".nbdist-events .nbdist-checkpoint")).to_contain_text(f"checkpoint of step {step:,} in")
        assert step == sheet.step()
        sheet.shot("paused")
        sheet.button("Resume").click()
        sheet.expect_state("running")
        sheet.expect_step_after(step)
        sheet.button("Stop").click()
        expect(sheet.static).to_be_visible()
        expect(sheet.static).to_contain_text("stopped")
        assert list((sheet.lab.folder / "checkpoints").glob("*/newest.json"))


def test_controls_are_reached_by_keyboard(open_notebook):
    """With Tab, in the order in which they stand; Space presses; typing a rate is no notebook command."""
    with open_notebook("keyboard.ipynb", START, NET, ENDLESS) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        keyboard, panel = sheet.page.keyboard, sheet.panel
        sheet.button("Pause").focus()
        keyboard.press("Space")
        sheet.expect_state("paused")
        sheet.button("Resume").focus()
        keyboard.press("Tab")
        expect(sheet.button("Checkpoint")).to_be_focused()
        keyboard.press("Tab")
        expect(sheet.button("Stop")).to_be_focused()
        keyboard.press("Tab")
        rate = panel.get_by_role("textbox", name="Learning rate")
        expect(rate).to_be_focused()
        keyboard.press("Control+a")
        keyboard.type("0.01b")
        keyboard.press("Escape")
        expect(rate).to_have_value("0.001")
        expect(sheet.page.locator(".jp-Notebook .jp-Cell")).to_have_count(3)
        keyboard.press("Shift+Tab")
        keyboard.press("Enter")
        expect(sheet.static).to_be_visible()


def test_an_engine_that_is_killed_comes_back(open_notebook):
    """Its row says so, the run goes on, and what happened stands there."""
    who = "import nbdist; print('pids', *(engine.pid for engine in nbdist.current_cluster().engines))"
    with open_notebook("killed.ipynb", START + "\n" + who, NET, ENDLESS) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        sheet.expect_step_after(3000)
        reported = sheet.page.locator(".jp-OutputArea-output", has_text="pids").inner_text()
        pids = re.search(r"pids (\d+) (\d+)", reported).groups()
        sheet.page.evaluate("""() => {
            window.seen = new Set();
            const look = () => document.querySelectorAll(".nbdist-panel tr[data-rank='1']").forEach(
                (row) => window.seen.add(row.dataset.state));
            new MutationObserver(look).observe(
                document.querySelector(".nbdist-panel"), { attributes: true, subtree: true });
        }""")
        os.kill(int(pids[1]), signal.SIGKILL)
        event = sheet.panel.locator(".nbdist-events .nbdist-recovered")
        expect(event).to_contain_text("rank 1 lost (its process ended), replaced in")
        sheet.expect_state("running")
        sheet.expect_step_after(sheet.step())
        assert {"lost", "recovering"} & set(sheet.page.evaluate("() => [...window.seen]"))
        expect(sheet.panel.locator("tr[data-rank='1']")).to_have_attribute(
            "data-state", re.compile("running|waiting|slow|evaluating")
        )
        sheet.expect_step_after(5000)
        sheet.shot("recovered")
        sheet.button("Stop").click()
        expect(sheet.static).to_contain_text("rank 1 lost")


def test_a_failure_is_seen_at_once(open_notebook):
    """The panel gives way to what remains, with the error; the traceback stands in the cell as always."""
    bad = "def torn(output, target):\n    raise ValueError('torn on purpose')"
    with open_notebook("failed.ipynb", START, NET, bad, "%dist_train model (x, y) --loss torn") as sheet:
        sheet.run_all()
        expect(sheet.static).to_contain_text("failed")
        expect(sheet.static).to_contain_text("torn on purpose")
        sheet.shot("failed")


def test_in_the_background_the_panel_goes_on_after_a_reload(open_notebook):
    """The notebook stays usable, another run waits for its turn; the page may be loaded anew."""
    again = "second = %dist_train model (x, y) --loss cross_entropy --epochs 1 --background"
    cells = START, NET, f"{ENDLESS} --background", "print('the notebook is', 'free')", again
    with open_notebook("background.ipynb", *cells) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        page = sheet.page
        expect(page.locator(".jp-OutputArea-output", has_text="the notebook is free")).to_be_visible()
        queued = page.locator(".nbdist-panel[data-state='queued']")
        expect(queued).to_be_visible()
        sheet.save()
        page.reload(wait_until="domcontentloaded")
        sheet.wait_until_ready()
        sheet.expect_state("running")
        sheet.expect_step_after(sheet.step())
        sheet.shot("reloaded")
        sheet.button("Pause").click()
        sheet.expect_state("paused")
        sheet.button("Stop").click()
        expect(page.locator(".nbdist-panel").last).to_have_attribute("data-state", re.compile("running|finished"))


def test_a_front_end_that_keeps_clicks_back_is_reported(browser, deaf_lab):
    """It points to the interrupt button, which works; with the cell over, or in the background, the buttons do."""
    with opened(browser, deaf_lab, "deaf.ipynb", START, NET, ENDLESS, f"{ENDLESS} --background") as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        hint = sheet.panel.locator(".nbdist-hint")
        expect(hint).to_contain_text("Clicks do not reach the kernel while this cell runs: ■")
        for name in ("Stop", "Pause", "Checkpoint"):
            expect(sheet.button(name)).to_be_disabled()
        sheet.shot("deaf")
        sheet.page.locator(
            "[data-command='notebook:interrupt-kernel'], [data-command='kernelmenu:interrupt']"
        ).first.click()
        expect(sheet.static).to_contain_text("stopped")
        sheet.page.locator(".jp-Notebook .jp-Cell").last.click()
        sheet.page.keyboard.press("Control+Enter")
        sheet.expect_state("running")
        expect(sheet.button("Stop")).to_be_enabled()
        sheet.button("Stop").click()
        expect(sheet.page.locator("div.nbdist").last).to_contain_text("stopped")


def test_the_classic_interface_shows_the_panel_too(open_notebook):
    """Notebook 7: the same panel, the same controls."""
    with open_notebook("classic.ipynb", START, NET, ENDLESS, interface="notebook") as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        sheet.expect_step_after(sheet.step())
        sheet.shot("classic")
        sheet.button("Stop").click()
        expect(sheet.static).to_contain_text("stopped")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nobody_is_shut_out(open_notebook, theme):
    """axe finds nothing serious in the live panel and in what remains."""
    from axe_playwright_python.sync_playwright import Axe

    name = "JupyterLab Dark" if theme == "dark" else "JupyterLab Light"
    with open_notebook(f"axe-{theme}.ipynb", START, NET, ENDLESS) as sheet:
        if theme == "dark":
            sheet.page.get_by_role("menuitem", name="Settings", exact=True).click()
            sheet.page.locator(".lm-Menu-item", has_text="Theme").first.hover()
            sheet.page.locator(".lm-Menu-item", has_text=name).first.click()
            expect(sheet.page.locator("body")).to_have_attribute("data-jp-theme-light", "false")
        sheet.run_all()
        sheet.expect_state("running")
        sheet.expect_step_after(3000)
        sheet.shot(f"running-{theme}")
        expect(sheet.panel.locator("svg[role=img]").first).to_be_visible()
        sheet.button("Pause").click()
        sheet.expect_state("paused")
        sheet.shot(f"panel-{theme}")
        for context in (".nbdist-panel", "div.nbdist"):
            found = Axe().run(sheet.page, context=context)
            serious = [v for v in found.response["violations"] if v["impact"] in ("serious", "critical")]
            assert not serious, [(v["id"], [node["html"] for node in v["nodes"]]) for v in serious]
            if context == ".nbdist-panel":
                sheet.button("Stop").click()
                expect(sheet.static).to_be_visible()
        sheet.shot(f"remains-{theme}")
