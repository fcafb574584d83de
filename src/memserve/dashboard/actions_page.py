"""The page that acts: each button first says what will happen, and asks."""

from __future__ import annotations

import ssl

from nicegui import background_tasks, context, ui

from memserve.dashboard.actions import Action, Kind, consequences, offered, perform
from memserve.dashboard.frame import Frame
from memserve.errors import ClusterError, ConfigError
from memserve.types import Role
from memserve.watch.snapshot import MemberSeen

_ICONS = {
    Kind.DRAIN: "pause",
    Kind.RESUME: "play_arrow",
    Kind.ROLE: "swap_horiz",
    Kind.RESTART: "restart_alt",
}


class Said:
    """Lines of progress, which all viewers see, with the newest last."""

    KEPT = 200

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)
        del self.lines[: -self.KEPT]


def add_actions_page(frame: Frame, tls: ssl.SSLContext | None, read_only: bool) -> None:
    """Register the page. With `read_only` it has no buttons."""
    said = Said()
    history = frame.watcher.history

    @ui.page("/actions")
    def actions() -> None:
        shown: list[tuple[object, ...]] = []
        address = context.client.ip or "somebody"

        def refresh() -> None:
            progress.set_text("\n".join(said.lines) or "Nothing was done yet.")
            members = () if history.latest is None else history.latest.members
            now = [(m.id, m.summary.role, m.summary.state, m.summary.life) for m in members]
            if now != shown:  # buttons stay where they are while nothing changes
                shown[:] = now
                listed.clear()
                with listed:
                    for member in members:
                        _row(member)

        def _row(member: MemberSeen) -> None:
            summary = member.summary
            with ui.element("div").classes("panel row items-center justify-between q-mb-sm"):
                ui.label(f"{member.id}: {summary.role.value}, {summary.state.value}")
                with ui.row().classes("items-center"):
                    for kind in () if read_only else offered(member):
                        if kind is Kind.ROLE:
                            _roles(member)
                        else:
                            _button(kind.value, Action(kind, member.id))

        def _button(words: str, action: Action) -> None:
            button = ui.button(words, icon=_ICONS[action.kind], on_click=lambda: ask(action))
            button.props(f'outline dense no-caps aria-label="{words} {action.member}"')

        def _roles(member: MemberSeen) -> None:
            for role in Role:
                if role is not member.summary.role:
                    _button(f"to {role.value}", Action(Kind.ROLE, member.id, role))

        async def ask(action: Action) -> None:
            if history.latest is None:
                return
            with ui.dialog() as dialog, ui.card():
                ui.label(f"{action.title}?").classes("text-h6")
                with ui.element("ul").classes("says"):
                    for line in consequences(action, history.latest):
                        with ui.element("li"):
                            ui.label(line)
                with ui.row().classes("w-full justify-end"):
                    ui.button("Cancel", on_click=lambda: dialog.submit(False)).props(
                        "flat no-caps autofocus"
                    )
                    ui.button(action.title, on_click=lambda: dialog.submit(True)).props("no-caps")
            confirmed = await dialog
            dialog.delete()
            if confirmed:
                # It goes on when this page is closed.
                background_tasks.create(_do(action, address), name=action.title)

        async def _do(action: Action, by: str) -> None:
            said.add(f"{action.title}: asked for by {by}")
            latest = history.latest
            url = frame.watcher.urls[0] if latest is None else latest.gateways[0]
            try:
                await perform(action, url, tls, lambda line: said.add(f"  {line}"), by)
            except (ClusterError, ConfigError) as error:
                said.add(f"{action.title}: failed: {error}")
            else:
                said.add(f"{action.title}: done")

        with frame.page("/actions", refresh):
            if read_only:
                ui.label("This dashboard only shows (--read-only).")
            listed = ui.element("div").classes("w-full")
            ui.label("What was done").classes("q-mt-md text-weight-medium")
            progress = ui.label().classes("panel mono w-full").style("white-space: pre-wrap")
            progress.props('role="status"')
