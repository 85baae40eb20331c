"""API keys: what is kept of them, who finds them, and the rates that they carry."""

import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dml.cli.keys import app
from dml.errors import ConfigError, DamagedFile, StorageError, UsageError
from service import state as state_module
from service.keys import KEY, Key, Keys, Scope, parse_lifetime
from service.limits import MOST_REQUESTS, Limiter, Rate, Windows
from service.remembered import Remembered
from service.state import APPLICATION_ID, FILE, VERSION, Section, State, StateFile

DAY = timedelta(days=1)


@pytest.fixture
def keys(tmp_path: Path):
    made = Keys(tmp_path / "state")
    yield made
    made.close()


def names(folder: Path) -> list[str]:
    """The keys of a state folder."""
    with Keys(folder) as keys:
        return [key.name for key in keys.list()]


# Keys


def test_a_key_is_found_by_its_text_and_by_nothing_else(keys):
    text, key = keys.add("shop", scope=Scope.WRITE, rate=Rate(5, 60))
    assert KEY.fullmatch(text)
    assert keys.find(text) == key
    assert (key.name, key.scope, key.rate, key.state()) == ("shop", Scope.WRITE, Rate(5, 60), "usable")
    other, _ = keys.add("other", scope=Scope.SEARCH)
    swapped = text[:17] + other[17:]
    last = "a" if text[-1] != "a" else "q"
    for wrong in (
        "",
        "dml_",
        text[:-1],
        text + "a",
        text.upper(),
        swapped,
        text[:-1] + last,
        f" {text}",
        "é",
    ):
        assert keys.find(wrong) is None, wrong


def test_no_two_keys_are_alike(keys):
    texts = [keys.add(f"key-{n}", scope=Scope.SEARCH)[0] for n in range(20)]
    assert len({text[:16] for text in texts}) == len({text[17:] for text in texts}) == 20


def test_the_secret_is_nowhere_on_the_disk_and_only_the_owner_may_read_it(keys):
    text, key = keys.add("shop", scope=Scope.SEARCH)
    secret = text[17:]
    files = list(keys.folder.iterdir())
    assert any(key.id.encode() in file.read_bytes() for file in files), "the test looks where keys are"
    for file in files:
        assert secret.encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
    assert stat.S_IMODE(keys.folder.stat().st_mode) & 0o077 == 0
    assert secret not in repr(key)
    assert repr(key.digest) not in repr(key)


def test_what_one_opening_changes_another_sees_at_once(keys):
    running = Keys(keys.folder)
    assert not running.any()
    text, _ = keys.add("shop", scope=Scope.SEARCH)
    assert running.find(text) is not None
    assert keys.revoke("shop").state() == "revoked"
    assert running.find(text) is None
    assert running.any(), "revoking the last key must not open the service"
    running.close()


def test_what_another_process_revokes_is_refused_at_once_and_after_a_restart(keys):
    text, _ = keys.add("shop", scope=Scope.SEARCH)
    assert keys.find(text) is not None
    command = [sys.executable, "-m", "dml", "keys", "revoke", "shop", "--state", str(keys.folder)]
    subprocess.run(command, check=True, capture_output=True)
    assert keys.find(text) is None
    reopened = Keys(keys.folder)
    assert reopened.find(text) is None
    assert [key.state() for key in reopened.list()] == ["revoked"]
    reopened.close()


def test_parts_that_open_the_state_one_after_the_other_keep_each_other_s_locks(keys):
    def command(*arguments):
        line = [sys.executable, "-m", "dml", "keys", *arguments, "--state", str(keys.folder)]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout

    keys.add("first", scope=Scope.SEARCH)
    jobs = State(keys.folder, Section("jobs", ("CREATE TABLE jobs (id TEXT)",)))
    log = keys.folder / f"{FILE}-wal"
    before = log.stat().st_ino
    command("list")  # the last process to leave deletes the log, unless it sees that others have it open
    assert log.stat().st_ino == before
    command("add", "second", "--scope", "write")
    assert [key.name for key in keys.list()] == ["first", "second"]
    command("revoke", "first")
    assert [key.state() for key in keys.list()] == ["revoked", "usable"]
    jobs.close()


def test_all_parts_of_a_service_share_one_opening_of_the_state(tmp_path):
    """Two connections, however many parts there are; and `dml keys` of another process is seen at once."""

    file = StateFile(tmp_path / "state")
    keys, memory = Keys(file), Remembered(file)
    text, _ = keys.add("shop", scope=Scope.SEARCH)
    memory.aliases.switch("shop", "/data/shoes", {"/data/shoes": "shoes"})
    memory.feedback.add("/data/shoes", "q", "a", relevant=True, key="shop")
    assert memory.jobs.newest(["/data/shoes"]) == []
    if Path("/proc/self/fd").is_dir():
        held = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        assert held.count(os.path.realpath(file.folder / FILE)) == 2
    command = [sys.executable, "-m", "dml", "keys", "revoke", "shop", "--state", str(file.folder)]
    subprocess.run(command, check=True, capture_output=True)
    assert keys.find(text) is None
    assert memory.aliases.current({"/data/shoes": "shoes"}) == {"shop": "shoes"}
    memory.close()
    assert keys.any(), "a part that ends leaves the file open to the others"
    file.close()


def test_a_state_that_was_replaced_is_read_anew(keys, tmp_path):
    """Restored from a backup, or moved away: the open file is no longer the one that `dml keys` changes."""
    old, _ = keys.add("old", scope=Scope.SEARCH)
    other = Keys(tmp_path / "other")
    new, _ = other.add("new", scope=Scope.SEARCH)
    other.close()
    for file in keys.folder.iterdir():
        file.unlink()
    assert keys.find(old) is None
    assert not keys.any()
    (tmp_path / "other" / FILE).rename(keys.folder / FILE)
    assert keys.find(old) is None
    assert keys.find(new) is not None


def test_an_expired_key_is_refused_and_listed(keys):
    text, key = keys.add("brief", scope=Scope.SEARCH, lifetime=DAY)
    assert key.expires is not None
    assert abs(key.expires - datetime.now(UTC) - DAY) < timedelta(minutes=1)
    assert keys.find(text) is not None
    with sqlite3.connect(keys.folder / FILE) as db:
        db.execute("UPDATE keys SET expires = created - 1")
    db.close()
    assert keys.find(text) is None
    assert [key.state() for key in keys.list()] == ["expired"]


def test_a_key_expires_at_its_moment_and_not_before():
    now = datetime.now(UTC)
    key = Key("0" * 12, "a", Scope.SEARCH, b"", created=now, expires=now + DAY)
    assert key.state(now + DAY - timedelta(seconds=1)) == "usable"
    assert key.state(now + DAY) == "expired"


def test_keys_are_revoked_by_name_or_id_and_names_may_then_be_used_again(keys):
    first, _ = keys.add("shop", scope=Scope.SEARCH)
    with pytest.raises(UsageError, match="dml keys revoke shop"):
        keys.add("shop", scope=Scope.SEARCH)
    revoked = keys.revoke("shop")
    second, key = keys.add("shop", scope=Scope.ADMIN)
    assert keys.find(first) is None
    assert keys.find(second) == key
    again = keys.revoke(revoked.id)
    assert again.revoked == revoked.revoked, "the moment of the first time stays"
    assert keys.find(second) == key
    assert keys.revoke("shop").id == key.id
    with pytest.raises(UsageError, match='no key "nobody"'):
        keys.revoke("nobody")


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "x" * 65, "-option", "ü", "a/b", '"'])
def test_a_name_that_would_confuse_a_log_is_refused(keys, name):
    with pytest.raises(UsageError, match="name of a key"):
        keys.add(name, scope=Scope.SEARCH)
    assert not keys.any()


def test_scopes_are_ordered_and_read_from_text():
    assert Scope.SEARCH < Scope.WRITE < Scope.ADMIN
    assert [Scope.parse(name) for name in ("search", "Write", "ADMIN")] == list(Scope)
    with pytest.raises(ConfigError, match="search, write, admin"):
        Scope.parse("root")


@pytest.mark.parametrize(
    ("text", "lifetime"), [("90d", 90 * DAY), ("2w", 14 * DAY), ("12h", DAY / 2), (" 30 min ", DAY / 48)]
)
def test_lifetimes_are_read_from_text(text, lifetime):
    assert parse_lifetime(text) == lifetime


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "0d", "1.5d", "3m", "1y", "99999d", "90 days"])
def test_what_is_no_lifetime_is_told_one(text):
    with pytest.raises(ConfigError, match="90d"):
        parse_lifetime(text)


def test_threads_and_processes_add_keys_side_by_side(keys):
    """Each has a connection of its own; none is lost, none fails."""
    openings = [Keys(keys.folder) for _ in range(4)]

    def add(opening: Keys, number: int) -> None:
        for position in range(5):
            opening.add(f"{number}-{position}", scope=Scope.SEARCH)

    threads = [threading.Thread(target=add, args=(o, n)) for n, o in enumerate(openings)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in keys.list()} == {f"{n}-{p}" for n in range(4) for p in range(5)}
    for opening in openings:
        opening.close()


# The state file


def test_whoever_opens_a_file_that_another_is_making_waits_for_it(tmp_path, monkeypatch):
    """SQLite itself gives up at once."""
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE sections (name TEXT PRIMARY KEY, version INTEGER NOT NULL)")
    other.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    other.execute(f"PRAGMA user_version = {VERSION}")
    other.execute("BEGIN IMMEDIATE")
    quick = sqlite3.connect(tmp_path / FILE, timeout=100)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        quick.execute("PRAGMA journal_mode = WAL")
    quick.close()
    waiter = threading.Timer(0.3, other.execute, ["COMMIT"])
    waiter.start()
    State(tmp_path, Section("jobs", ("CREATE TABLE jobs (id TEXT)",))).close()
    waiter.join()
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(state_module, "WAIT_SECONDS", 0.1)
    with pytest.raises(StorageError, match="cannot be used: database is locked"):
        State(tmp_path)
    other.close()


def test_reading_makes_no_files(tmp_path):
    keys = Keys(tmp_path / "nowhere")
    assert (keys.any(), keys.list(), keys.find("dml_x")) == (False, [], None)
    assert not (tmp_path / "nowhere").exists()


def test_sections_join_and_move_on_by_their_steps(tmp_path):
    first = Section("jobs", ("CREATE TABLE jobs (id TEXT); INSERT INTO jobs VALUES ('old')",))
    second = Section("jobs", (*first.steps, "ALTER TABLE jobs ADD COLUMN state TEXT DEFAULT 'done'"))
    with Keys(tmp_path) as keys:
        keys.add("shop", scope=Scope.SEARCH)
    for section in (first, second, second):
        state = State(tmp_path, section)
        with state.reading() as db:
            rows = db.execute("SELECT * FROM jobs").fetchall()
        state.close()
    assert rows == [("old", "done")]
    with pytest.raises(UsageError, match="written by a newer dml: it has jobs of version 2"):
        State(tmp_path, first)
    assert names(tmp_path) == ["shop"]


def test_nobody_waits_for_a_writer_elsewhere_to_read_what_is_there(tmp_path, monkeypatch):
    there, missing = (
        Section("jobs", ("CREATE TABLE jobs (id TEXT)",)),
        Section("more", ("CREATE TABLE more",)),
    )
    State(tmp_path, there).close()
    file = StateFile(tmp_path)
    assert not Keys(file).any()
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    monkeypatch.setattr(state_module, "WAIT_SECONDS", 0.1)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(State, "writing", lambda self: pytest.fail("it writes"))
    assert file.if_there(there) is file.made(there)
    assert file.if_there(missing) is None, "reading makes no tables"
    other.close()
    file.close()


def test_others_read_while_a_part_has_its_tables_made(tmp_path, monkeypatch):
    """Which may take as long as a writer in another process does; the event loop looks for keys meanwhile."""
    file = StateFile(tmp_path)
    keys = Keys(file)
    text, _ = keys.add("shop", scope=Scope.SEARCH)
    prepare, at, go, waited = State.prepare, threading.Event(), threading.Event(), []

    def slow(self: State, section: Section) -> None:
        if section.name == "jobs":
            at.set()
            waited.append(go.wait(5))
        prepare(self, section)

    monkeypatch.setattr(State, "prepare", slow)
    section = Section("jobs", ("CREATE TABLE jobs (id TEXT)",))
    making = threading.Thread(target=file.made, args=(section,))
    making.start()
    at.wait()
    assert keys.find(text) is not None
    go.set()
    making.join()
    assert waited == [True], "the key was found meanwhile"
    assert file.if_there(section) is not None
    file.close()


def test_a_step_that_fails_leaves_what_was_there(tmp_path):
    State(tmp_path, Section("jobs", ("CREATE TABLE jobs (id TEXT)",))).close()
    broken = Section("jobs", ("CREATE TABLE jobs (id TEXT)", "CREATE TABLE more (x TEXT); NONSENSE"))
    with pytest.raises(StorageError, match="cannot be used"):
        State(tmp_path, broken)
    state = State(tmp_path, Section("jobs", broken.steps[:1]))
    with state.reading() as db:
        assert not db.execute("SELECT * FROM sqlite_master WHERE name = 'more'").fetchall()
    state.close()


def insert_twice(state: State) -> None:
    with state.writing() as db:
        db.execute("INSERT INTO jobs VALUES ('a')")
        db.execute("INSERT INTO jobs VALUES ('a')")


def test_a_block_that_raises_is_undone(tmp_path):
    state = State(tmp_path, Section("jobs", ("CREATE TABLE jobs (id TEXT UNIQUE)",)))
    with pytest.raises(sqlite3.IntegrityError):
        insert_twice(state)
    with state.reading() as db:
        assert db.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
    state.close()


@pytest.mark.parametrize(
    "content", [b"no database, but long enough " * 100, b"SQLite format 3\0" + bytes(4096)]
)
def test_a_damaged_state_is_told_and_never_taken_for_no_keys(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises((DamagedFile, StorageError), match=re.escape(str(tmp_path))):
        names(tmp_path)


def test_a_database_of_something_else_and_of_a_newer_version_are_refused(tmp_path):
    for folder, script, kind in (
        ("foreign", "CREATE TABLE photos (id TEXT)", DamagedFile),
        ("newer", "PRAGMA user_version = 99", UsageError),
    ):
        (tmp_path / folder).mkdir()
        if folder == "newer":
            with Keys(tmp_path / folder) as keys:
                keys.add("shop", scope=Scope.SEARCH)
        db = sqlite3.connect(tmp_path / folder / FILE)
        db.execute(script)
        db.commit()
        db.close()
        with pytest.raises(kind):
            names(tmp_path / folder)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="--state"):
        Keys(tmp_path / "file" / "state").add("shop", scope=Scope.SEARCH)


# Rates


@pytest.mark.parametrize(
    ("text", "rate"), [("100/min", Rate(100, 60)), ("5 / s", Rate(5, 1)), ("1/d", Rate(1, 86_400))]
)
def test_rates_are_read_from_text_and_written_back(text, rate):
    assert Rate.parse(text) == rate
    assert Rate.parse(str(rate)) == rate


@pytest.mark.parametrize(
    "text", ["", "100", "/min", "0/min", "-1/s", "1/month", "1.5/s", f"{MOST_REQUESTS + 1}/d"]
)
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ConfigError):
        Rate.parse(text)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_window_moves_with_the_requests_in_it():
    clock = Clock()
    limiter, rate = Limiter(clock), Rate(3, 60)
    for remaining in (2, 1, 0):
        verdict = limiter.take(rate, "a")
        assert (verdict.allowed, verdict.remaining) == (True, remaining)
        clock.now += 10
    refused = limiter.take(rate, "a")
    assert (refused.allowed, refused.remaining, refused.seconds) == (False, 0, 30)
    clock.now += 29.5
    assert limiter.take(rate, "a").seconds == 1
    clock.now += 0.5
    assert limiter.take(rate, "a").allowed, "the first has left the window"
    assert not limiter.take(rate, "a").allowed, "the second has not"
    assert limiter.take(rate, "b").allowed, "others are not counted with it"


def test_in_no_window_of_its_length_is_a_rate_exceeded(scale):
    import random

    chance, clock = random.Random(4), Clock()
    limiter, rate, let_through = Limiter(clock), Rate(7, 20), []
    for _ in range(2000 * scale):
        clock.now += chance.expovariate(1.0)
        if limiter.take(rate, "a").allowed:
            let_through.append(clock.now)
    assert len(let_through) > 300 * scale
    assert all(
        later - first >= rate.seconds for first, later in zip(let_through, let_through[7:], strict=False)
    )


def test_refused_requests_do_not_prolong_the_wait():
    clock = Clock()
    limiter, rate = Limiter(clock), Rate(1, 60)
    limiter.take(rate, "a")
    for _ in range(59):
        clock.now += 1
        assert not limiter.take(rate, "a").allowed
    clock.now += 1
    assert limiter.take(rate, "a").allowed


def test_what_is_remembered_is_bounded_and_the_quietest_is_forgotten_first():
    clock = Clock()
    windows = Windows(clock, most=3)
    for who in "abca":
        clock.now += 1
        windows.acquire_entry(who, 9, 60)
    windows.acquire_entry("d", 9, 60)
    assert [windows.get_moving_window(who, 9, 60)[1] for who in "abcd"] == [2, 0, 1, 1]
    clock.now += 100
    assert windows.get_moving_window("a", 9, 60)[1] == 0
    assert windows.reset() == 2, "a window with nothing in it is forgotten when it is looked at"


# The command


def dml_keys(*arguments: str, state: Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [*arguments, "--state", str(state)], catch_exceptions=False)
    return done.exit_code, done.stdout, done.stderr


def test_the_key_alone_goes_to_stdout_so_that_a_script_can_keep_it(tmp_path):
    _, out, told = dml_keys(
        "add", "shop", "--scope", "search", "--expires", "90d", "--rate", "100/min", state=tmp_path
    )
    assert KEY.fullmatch(out.strip())
    assert "shown this once" in told
    assert out.strip() not in told
    with Keys(tmp_path) as keys:
        key = keys.find(out.strip())
    assert key is not None
    assert (key.scope, key.rate) == (Scope.SEARCH, Rate(100, 60))


def test_lists_show_every_key_and_no_secret(tmp_path):
    _, added, _ = dml_keys("add", "shop", "--scope", "write", "--json", state=tmp_path)
    text = json.loads(added)["key"]
    dml_keys("add", "gone", "--scope", "search", state=tmp_path)
    assert dml_keys("revoke", "gone", state=tmp_path)[0] == 0
    _, listed, _ = dml_keys("list", state=tmp_path)
    assert re.search(r"shop +[0-9a-f]{12} +write +usable", listed)
    assert re.search(r"gone +[0-9a-f]{12} +search +revoked", listed)
    assert text[17:] not in listed
    [shop, gone] = json.loads(dml_keys("list", "--json", state=tmp_path)[1])
    assert (shop["name"], shop["state"], gone["state"]) == ("shop", "usable", "revoked")
    assert "digest" not in shop


def test_no_keys_are_told_with_the_folder_that_was_looked_into(tmp_path):
    code, out, told = dml_keys("list", state=tmp_path / "none")
    assert (code, out) == (0, "")
    assert str(tmp_path / "none") in told
    assert not (tmp_path / "none").exists()


def test_the_state_folder_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_STATE", str(tmp_path / "there"))
    CliRunner().invoke(app, ["add", "shop", "--scope", "search"], catch_exceptions=False)
    assert names(tmp_path / "there") == ["shop"]


def test_mistakes_are_one_message_and_exit_code_2(tmp_path):
    environment = {**os.environ, "DML_STATE": str(tmp_path)}
    for arguments, text in (
        (["add", "shop", "--scope", "root"], "search, write, admin"),
        (["revoke", "nobody"], "no key"),
    ):
        command = [sys.executable, "-m", "dml", "keys", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2
        assert text in done.stderr
        assert "Traceback" not in done.stderr


def test_a_state_that_is_a_file_is_not_taken_for_one_without_keys(tmp_path: Path):
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(UsageError, match=r"--state names a folder, and .* is a file"):
        CliRunner().invoke(app, ["list", "--state", str(tmp_path / FILE)], catch_exceptions=False)
