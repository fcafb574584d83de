"""The application of `memserve top`: tables of members and decisions, which a `Watcher` fills."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Static

from memserve.top import rows
from memserve.watch import text
from memserve.watch.history import History
from memserve.watch.snapshot import DecisionSeen
from memserve.watch.watcher import POLL_SECONDS, Watcher

_DRAWN = ("#title", "#trouble", "#figures", "#members", "#decisions", "#reason", "#filter")
MAX_WIDTH = 96  # of the help and of latencies; `#help` in the CSS says it, too
HELP = """[b]Keys[/b]
 s S r   sort members by the next, the previous column; reverse the order
 /       filter by words (id, role, kind, state, host, request); Esc: all
 Tab     to the other table; ↑ ↓ PgUp PgDn move in it
 p q     pause and go on; quit
 l       latencies by policy (at the gateways) and by role (at instances)
[b]Members[/b]
 HBM, DRAM   blocks: █ active ▓ being read ▒ cached ░ free; share not free
 run, wait   sequences in the batch, and in the queue
 tok/s       generated tokens a second
 hits        cached share of the prompt tokens that were not received
 silent      no answer to the gateway's last poll
[b]Decisions[/b], the selected one with its reason and its best candidates
 first, whole   time to a stream's first token, and to the end
 planned        the same as predicted
 ●              chosen: score (weighted seconds), then the predicted terms
Rates are over the last five seconds. [b]Esc[/b] closes this."""


class HelpScreen(ModalScreen[None]):
    """The keys, and what the figures mean."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q", "dismiss", "close"),
    ]

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="help"):
            yield Static(HELP)


class LatencyScreen(ModalScreen[None]):
    """Percentiles of latencies by policy and by role."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,l,q", "dismiss", "close")]

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="help"):
            yield Static(id="latencies")

    def on_mount(self) -> None:
        self.show()

    def on_resize(self, event: Resize) -> None:
        self.show()

    def show(self) -> None:
        """Draw the latencies. Before the screen is composed there is nowhere to, though it is the
        current one already; `on_mount` draws then."""
        if not self.query("#latencies"):
            return
        width = min(self.app.size.width, MAX_WIDTH) - 4  # without border and padding
        self.query_one("#latencies", Static).update(rows.latencies(self._history, width))


class TopApp(App[None]):
    """A cluster, live."""

    TITLE = "memserve top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #title, #trouble, #figures { height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    #title { background: $primary; color: $text; text-style: bold; }
    #trouble { background: $error; color: $text; display: none; }
    DataTable { height: 1fr; }
    #decisions { height: 1fr; }
    #reason { height: 5; border-top: solid $primary; padding: 0 1;
              text-wrap: nowrap; text-overflow: ellipsis; }
    #filter { display: none; height: 1; border: none; padding: 0 1; }
    .stale DataTable { opacity: 50%; }
    HelpScreen { align: center middle; }
    #help { width: 100%; max-width: 96; height: auto; max-height: 100%;
            background: $surface; border: round $primary; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("s", "sort(1)", "sort"),
        Binding("S", "sort(-1)", "sort back", show=False),
        Binding("r", "reverse", "reverse"),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("escape", "unfilter", "all", show=False),
        Binding("p", "pause", "pause"),
        Binding("l", "latency", "latency"),
        Binding("question_mark", "help", "help", key_display="?"),
    ]

    def __init__(
        self,
        urls: Sequence[str],
        tls: ssl.SSLContext | None = None,
        pause: float = POLL_SECONDS,
        watcher: Watcher | None = None,
    ) -> None:
        """`pause`: seconds between polls. `watcher`: for tests; it is polled as usual."""
        super().__init__()
        self.watcher = watcher or Watcher(urls, tls)
        self._pause = pause
        self._paused = False
        self._sort = 0
        self._descending = rows.COLUMNS[0].descending
        self._wanted = ""
        self._decisions: list[DecisionSeen] = []

    def compose(self) -> ComposeResult:
        yield Static(id="title")
        yield Static(id="trouble")
        yield Static(id="figures")
        yield DataTable(id="members", cursor_type="row", cell_padding=0, zebra_stripes=True)
        yield DataTable(id="decisions", cursor_type="row", cell_padding=0)
        yield Static(id="reason")
        yield Input(placeholder="filter: words, Enter, Esc", id="filter", compact=True)
        yield Footer()

    def on_mount(self) -> None:
        self._title("…")
        self.run_worker(self._follow(), exclusive=True)

    async def _follow(self) -> None:
        async with self.watcher as watcher:
            await watcher.run(self._told, self._pause)

    def _told(self) -> None:
        if not self._paused:
            self.show()

    def on_resize(self, event: Resize) -> None:
        self._columns()
        self.show()

    # --- keys -----------------------------------------------------------------------------

    def action_sort(self, step: int) -> None:
        self._sort = (self._sort + step) % len(rows.COLUMNS)
        self._descending = rows.COLUMNS[self._sort].descending
        self._columns()
        self.show()

    def action_reverse(self) -> None:
        self._descending = not self._descending
        self._columns()
        self.show()

    def action_pause(self) -> None:
        self._paused = not self._paused
        self.show()

    def action_help(self) -> None:
        self.push_screen(HelpScreen())

    def action_latency(self) -> None:
        self.push_screen(LatencyScreen(self.watcher.history))

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.display = True
        box.focus()

    def action_unfilter(self) -> None:
        box = self.query_one("#filter", Input)
        box.value = ""
        self._close(box)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._close(event.input)

    def on_input_changed(self, event: Input.Changed) -> None:
        self._wanted = event.value
        self.show()

    def _close(self, box: Input) -> None:
        box.display = bool(box.value)
        self._members.focus()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        if event.data_table.id != "members":
            return
        if event.column_index == self._sort:
            self.action_reverse()
        else:
            self.action_sort(event.column_index - self._sort)

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        if event.data_table.id == "decisions":
            self._explain()

    # --- drawing --------------------------------------------------------------------------

    @property
    def _members(self) -> DataTable[Text | str]:
        return self.query_one("#members", DataTable)

    @property
    def _table(self) -> DataTable[Text | str]:
        return self.query_one("#decisions", DataTable)

    def _columns(self) -> None:
        """Make the columns anew: the first one takes what room is left."""
        spare = max(self.size.width - sum(column.width for column in rows.COLUMNS) - 2, 0)
        self._members.clear(columns=True)
        for number, column in enumerate(rows.COLUMNS):
            arrow = "" if number != self._sort else "↓" if self._descending else "↑"
            width = column.width + (min(spare, 40) if number == 0 else 0)
            self._members.add_column(f"{column.name}{arrow}", width=width, key=column.name)
        self._table.clear(columns=True)
        room = max(self.size.width - sum(width for _, width in rows.DECISION_COLUMNS) - 2, 0)
        for name, width in rows.DECISION_COLUMNS:
            more = min(room, 40) if name == "goes to" else 0
            self._table.add_column(name.strip(), width=width + more, key=name)

    def show(self) -> None:
        """Draw what the watcher knows, unless the help is over it, or it all ends."""
        if isinstance(self.screen, LatencyScreen):
            self.screen.show()
            return
        # At the end widgets go one by one.
        if len(self.screen_stack) != 1 or len(self.query(", ".join(_DRAWN))) < len(_DRAWN):
            return
        history, snapshot = self.watcher.history, self.watcher.history.latest
        self._say_trouble()
        if snapshot is None or not self._members.columns:
            return
        self._title(rows.headline(snapshot))
        points = history.points
        rates = history.rates
        lines = (
            ("tok/s", [p.tokens for p in points], text.short(rates.whole.tokens)),
            ("TTFT", [p.first_token for p in points], text.seconds(rates.first_token.p50)),
            ("hits", [p.hit_ratio for p in points], text.share(rates.whole.hit_ratio)),
        )
        self.query_one("#figures", Static).update(rows.figures(lines, self.size.width))
        members = rows.member_rows(snapshot, rates, self._sort, self._descending, self._wanted)
        _fill(
            self._members,
            [(member.id, rows.member_cells(member, rates.of(member.id))) for member in members],
        )
        self._decisions = rows.decision_rows(snapshot, self._wanted)
        now = self.watcher.clock.now()
        # A request that was lost has a decision for each instance that had it.
        keyed = [(f"{seen.view.request} {seen.view.at}", seen) for seen in self._decisions]
        _fill(self._table, [(key, rows.decision_cells(seen, now)) for key, seen in keyed])
        self._explain()

    def _title(self, words: str) -> None:
        where = ", ".join(self.watcher.urls)
        paused = "paused  " if self._paused else ""
        line = Text(f" {paused}{where}  {words}", no_wrap=True, overflow="ellipsis")
        self.query_one("#title", Static).update(line)

    def _say_trouble(self) -> None:
        line = self.query_one("#trouble", Static)
        trouble, snapshot = self.watcher.trouble, self.watcher.history.latest
        line.display = trouble is not None
        self.screen.set_class(self.watcher.lost, "stale")
        if trouble is None:
            return
        told = "Trying again"
        if self.watcher.lost and snapshot is not None:
            old = text.age(self.watcher.clock.now() - snapshot.at)
            told = f"Trying again; these figures are {old} old"
        line.update(Text(f" {told}: {trouble}", no_wrap=True, overflow="ellipsis"))

    def _explain(self) -> None:
        at = self._table.cursor_row
        reason = self.query_one("#reason", Static)
        if 0 <= at < len(self._decisions):
            reason.update(rows.explanation(self._decisions[at], 4))
        else:
            reason.update(Text("no decisions yet" if not self._wanted else "no match"))


def _fill(
    table: DataTable[Text | str], lines: Sequence[tuple[str, tuple[Text | str, ...]]]
) -> None:
    """Replace a table's rows. The cursor stays with its row, unless it is at the top: there it
    stays with what is newest."""
    at, top = table.cursor_row, table.scroll_offset.y
    kept = list(table.rows)[at].value if 0 < at < len(table.rows) else None
    table.clear()
    for key, cells in lines:
        table.add_row(*cells, key=key)
    if kept is not None and kept in table.rows:
        table.move_cursor(row=table.get_row_index(kept), scroll=False)
    table.scroll_to(y=top, animate=False)
