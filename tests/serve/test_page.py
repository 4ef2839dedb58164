"""GET /smc in a real browser, before a real server."""

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from .browser import CHROMIUM, browse
from .conftest import KEY, MAX_PARTICLES

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
TASK = {"prompt": "theprompt", "n_particles": 24, "max_tokens": 12, "seed": 7, "ess_threshold": 1.0}
LEXICON = {"potential": "lexicon", "potential_args": {"token_ids": [5, 6, 7], "weight": 1.5}}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browse(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def page(browser, server):
    """The page, opened anew; what it complains of, and what it loads from elsewhere, is an error."""
    browser.complaints.clear()
    browser.loaded.clear()
    browser.open(f"{server.url}/smc")
    yield browser
    assert browser.complaints == []
    assert all(url.startswith((server.url, "blob:", "data:")) for url in browser.loaded), browser.loaded


def fill(page, key=KEY, **fields):
    """Puts values into the form's fields, as a user would."""
    for name, value in {"key": key, **fields}.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        page.run(f"""(() => {{
            const input = document.querySelector('[data-field="{name}"]');
            input.value = {json.dumps(text)};
            input.dispatchEvent(new Event('input', {{ bubbles: true }}));
        }})()""")


def press_run(page, **fields):
    fill(page, **fields)
    page.run("document.getElementById('run').click()")


def text_of(page, element):
    return page.run(f"document.getElementById('{element}').textContent")


def finish(page):
    page.wait("!document.getElementById('run').disabled")


def test_the_page_needs_no_key_and_allows_nothing_from_elsewhere(page, server):
    answer = server.client.get("/smc", headers={"Authorization": ""})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and "unsafe" not in str(policy)
    assert KEY not in answer.text
    refused = [
        "fetch('data:text/plain,x').then(() => 'loaded', () => 'refused')",
        "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'put in' } catch { return 'refused' } })()",
        """new Promise(done => { const script = document.createElement('script');
           window.ran = false; script.append('window.ran = true'); document.head.append(script);
           setTimeout(() => done(window.ran ? 'ran' : 'refused'), 50); }).catch(() => 'refused')""",
    ]
    assert [page.run(script) for script in refused] == ["refused"] * 3
    page.complaints.clear()  # of the policy's


def test_a_run_from_form_to_download(page, server):
    page.run("""{
        window.saved = []; const make = URL.createObjectURL;
        URL.createObjectURL = (blob) => { window.saved.push(blob); return make(blob); };
        HTMLAnchorElement.prototype.click = function () { window.savedAs = this.download; };
    }""")
    press_run(page, **TASK, **LEXICON)
    page.wait("population !== null")
    finish(page)
    expected = server.smc(**TASK, **LEXICON, return_genealogy=True)

    assert page.run("steps.length") == expected["steps"]
    seen = page.run("steps")
    assert [step["step"] for step in seen] == list(range(seen[0]["step"], seen[0]["step"] + expected["steps"]))
    assert all(1 - 1e-3 <= step["ess"] <= 24 + 1e-3 and 0 <= step["distinct"] <= 24 for step in seen)
    log_z, error = text_of(page, "log-z").replace("−", "-").split(" ± ")
    assert float(log_z) == pytest.approx(expected["log_z"], abs=1e-4)
    assert float(error) == pytest.approx(expected["log_z_stderr"], rel=0.05)
    assert float(text_of(page, "ess")) == pytest.approx(expected["ess"], rel=1e-3)
    assert text_of(page, "tokens") == str(expected["usage"]["particle_tokens"])
    assert text_of(page, "status").startswith("Done: 24 particles") and text_of(page, "error") == ""
    for chart in ("ess-chart", "z-chart"):
        assert page.run(f"document.querySelector('#{chart} .curve').getTotalLength()") > 200
        assert "after 12 steps" in page.run(f"document.getElementById('{chart}').getAttribute('aria-label')")

    weights = {}
    for particle in expected["particles"]:
        key = particle["text"], particle["finish_reason"]
        weights[key] = weights.get(key, 0) + particle["weight"]
    rows = page.run("""[...document.querySelectorAll('#rows tr')].map(row => [
        row.querySelector('.text div').firstChild?.data ?? '',
        row.children[3].textContent, Number(row.querySelector('.weight').textContent)])""")
    assert {(text, reason): weight for text, reason, weight in rows} == pytest.approx(weights, abs=6e-5)
    shown = [weight for *_, weight in rows]
    assert shown == sorted(shown, reverse=True)
    assert page.run("document.querySelectorAll('#rows .badge').length") == 1

    page.run("document.getElementById('download').click()")
    saved = json.loads(page.run("window.saved[0].text()"))
    assert saved["genealogy"] == expected["genealogy"] and saved["samples"] == expected["samples"]
    assert [p["text"] for p in saved["particles"]] == [p["text"] for p in expected["particles"]]
    assert page.run("window.savedAs").endswith(".json") and KEY not in json.dumps(saved)
    assert page.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def ink(page):
    """How many pixels of the picture are drawn on."""
    page.frame()
    return page.run("""(() => { const c = document.getElementById('canvas');
        const { data } = c.getContext('2d').getImageData(0, 0, c.width, c.height - 20);
        return data.filter((v, i) => i % 4 === 3 && v).length })()""")


def test_the_picture_zooms_moves_and_says_its_tokens(page, server):
    press_run(page, **TASK, **LEXICON)
    page.wait("population !== null")
    drawn = ink(page)
    assert drawn > 1000
    # a lineage of the picture is the particle's text
    spelt = """graph => Array.from({ length: graph.N }, (_, i) => { let k = (graph.T - 1) * graph.N + i, out = [];
        for (;;) { if (graph.token[k] >= 0) out.push(spell(graph.token[k]));
                   if (k < graph.N) return out.reverse().join('');
                   k = (Math.floor(k / graph.N) - 1) * graph.N + graph.parent[k]; } })"""
    texts = page.run("population.particles.map(p => p.token_ids.map(t => spell(t)).join(''))")
    assert page.run(f"({spelt})(graph)") == texts
    assert page.run("graph.alive.slice(-graph.N).every(a => a) && graph.roots.length <= graph.N")
    # in the tree no two lineages cross: parents are in the order of their children
    assert page.run("""(() => { for (let t = 1; t < graph.T; t++) { const rows = [];
        for (let i = 0; i < graph.N; i++) if (graph.alive[t * graph.N + i]) rows.push(i);
        rows.sort((a, b) => graph.y[t * graph.N + a] - graph.y[t * graph.N + b]);
        const above = rows.map(i => graph.y[(t - 1) * graph.N + graph.parent[t * graph.N + i]]);
        if (above.some((y, k) => k && y < above[k - 1] - 1e-3)) return false; } return true })()""")

    page.run("document.getElementById('picture').scrollIntoView({ block: 'center' })")
    box = page.run("(({ x, y, width, height }) => ({ x, y, width, height }))(canvas.getBoundingClientRect())")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    fitted = page.run("view")
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-400)
    page.frame()
    assert page.run("view") == fitted  # not clicked: the page scrolls, where it can
    page.run(
        "document.getElementById('picture').scrollIntoView({ block: 'center' }); canvas.focus({ preventScroll: true })"
    )
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-400)
    page.wait(f"view.sx > {fitted['sx']}")
    zoomed = page.run("view")
    page.mouse("mousePressed", x, y, button="left", clickCount=1)
    page.mouse("mouseMoved", x + 40, y + 30, button="left", buttons=1)
    page.mouse("mouseReleased", x + 40, y + 30, button="left", clickCount=1)
    moved = page.run("view")
    assert moved["sx"] == zoomed["sx"] and moved["ox"] > zoomed["ox"]
    page.mouse("mouseMoved", x, y)
    page.wait("document.getElementById('tip').style.display === 'block'")
    assert "step" in text_of(page, "tip")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="0", text="0")
    page.wait(f"view.sx === {fitted['sx']}")
    page.mouse("mouseMoved", 5, 5)

    page.frame()
    plain = page.run("canvas.toDataURL()")
    page.run("document.querySelector('#rows .trace').click()")
    page.frame()
    assert page.run("traced.size") > 0 and page.run("canvas.toDataURL()") != plain
    page.run("document.querySelector('#rows .trace').click()")
    page.frame()
    assert page.run("traced.size") == 0 and page.run("canvas.toDataURL()") == plain
    page.run("const c = document.getElementById('layout'); c.value = 'rows'; c.dispatchEvent(new Event('change'))")
    page.frame()
    assert not page.run("graph.tree") and page.run("canvas.toDataURL()") != plain


@pytest.mark.parametrize(
    "fields, title, message, wrong",
    [
        ({"key": ""}, "The API key is missing or wrong", "Unauthorized", "key"),
        ({"n_particles": MAX_PARTICLES + 1}, "Over a limit of this server", "max_particles", None),
        ({"ess_threshold": 3}, "The request is wrong", "ess_threshold=3", "ess_threshold"),
        ({"potential": "nothing"}, "The request is wrong", "nothing", "potential"),
        ({"potential": "regex", "potential_args": "{pattern"}, "The request is wrong", "not JSON", "potential_args"),
        ({"potential": "never"}, "No particle has weight", "", None),
        ({"potential": "fails"}, "The server failed", "", None),
    ],
)
def test_an_error_is_shown_with_its_field(page, fields, title, message, wrong):
    press_run(page, **{**TASK, **fields})
    page.wait("document.getElementById('error').classList.contains('shown')")
    finish(page)
    said = text_of(page, "error")
    assert said.startswith(title) and message in said
    assert page.run("document.getElementById('error').checkVisibility()")
    if wrong is not None:
        assert page.run("document.querySelector('[aria-invalid]').dataset.field") == wrong
    press_run(page, **TASK, potential="", potential_args="")
    page.wait("population !== null")
    assert text_of(page, "error") == "" and not page.run("!!document.querySelector('[aria-invalid]')")


def test_chat_and_stop(page, server):
    page.run("document.querySelector('[value=messages]').click()")
    page.run("document.querySelectorAll('#messages textarea')[1].value = 'hello'")
    press_run(page, **TASK)
    page.wait("population !== null")
    finish(page)
    expected = server.smc(**{**TASK, "prompt": None}, messages=[{"role": "user", "content": "hello"}])
    assert page.run("population.log_z") == pytest.approx(expected["log_z"], abs=1e-5)
    press_run(page, potential="slow", n_particles=8, max_tokens=200)
    page.wait("steps.length > 0")
    page.run("document.getElementById('stop-run').click()")
    page.wait("document.getElementById('status').textContent.startsWith('Stopped')")
    assert server.wait_idle()


def test_what_a_model_says_is_text_at_any_size(page):
    """1,000 particles of 128 steps: hostile text stays text, and the picture is no thousand elements."""
    hostile = "<img src=x onerror='window.harmed = true'><script>window.harmed = true</script>"
    page.run(f"""{{
        const N = 1000, T = 128, rows = [...Array(N).keys()], hostile = {json.dumps(hostile)};
        asked = {{ n_particles: N, max_tokens: T }};
        showPopulation({{ event: 'population', id: hostile, model: hostile, log_z: -3.5, log_z_stderr: null, ess: 500,
            samples: [0], usage: {{}},
            particles: rows.map(i => ({{ text: hostile + i, token_ids: [i], weight: 1 / N,
                log_weight: 0, log_prob: -1, finish_reason: 'length' }})),
            genealogy: {{ ancestors: Array.from({{ length: T }}, (_, t) => rows.map(i => t % 9 ? i : i - i % 2)),
                tokens: Array.from({{ length: T }}, () => rows),
                token_texts: {{ 0: hostile }} }} }});
    }}""")
    assert ink(page) > 10_000
    box = page.run("(({ x, y }) => ({ x, y }))(canvas.getBoundingClientRect())")
    page.mouse("mouseMoved", box["x"] + 25, box["y"] + 21)
    page.wait("document.getElementById('tip').style.display === 'block'")
    page.run("zoom(50, 0, 0)")
    assert ink(page) > 1000
    assert page.run("document.querySelectorAll('*').length") < 2000
    assert page.run("document.querySelectorAll('img, main script').length") == 0 and page.run("window.harmed") is None
    assert page.run("document.querySelector('#rows .text div').textContent").startswith(hostile)
    page.run("document.getElementById('more').click()")
    assert page.run("document.querySelectorAll('#rows tr').length") == 250


def test_labels_and_themes(page, server):
    unnamed = page.run("""[...document.querySelectorAll('input, select, textarea, canvas, svg, button')].filter(e =>
        !(e.hidden || e.labels?.length || e.getAttribute('aria-label') || e.tagName === 'BUTTON' && e.textContent)
    ).length""")
    assert unnamed == 0
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.run(colour)
    page.open(f"{server.url}/smc", width=400, height=900, dark=True)
    assert page.run(colour) != light
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
