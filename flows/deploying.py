"""What `prefect deploy` makes at the server beside the deployments: a queue, two automations.

Named as a build step in `deployment.yaml`; doing it again changes nothing.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from prefect import get_client

if TYPE_CHECKING:
    from prefect.client.schemas.objects import StateType
    from prefect.events.schemas.automations import AutomationCore

TAG = "p2d"
"""What every deployment of `deployment.yaml` is tagged with."""
LOST = "Lost"
"""State of a run that gave no sign of life, for the moment until it is scheduled again."""
HEARTBEAT_SECONDS = 30
"""Between two signs of life of a run (`p2d worker`); Prefect knows no shorter one."""


def prepare(pool: str, queue: str, seconds_to_live: int = 90) -> dict[str, str]:
    """Lets one run at a time out of the queue, and has killed runs taken up again.

    Args:
        pool: work pool; there already (`prefect work-pool create NAME --type process`).
        queue: of the pool, one for each store, so that no two runs fight over a machine.
        seconds_to_live: without a sign of life, after which a run counts as killed.
    """
    with get_client(sync_client=True) as client:
        from prefect.exceptions import ObjectNotFound

        try:
            found = client.read_work_queue_by_name(queue, work_pool_name=pool)
            client.update_work_queue(found.id, concurrency_limit=1)
        except ObjectNotFound:
            client.create_work_queue(queue, work_pool_name=pool, concurrency_limit=1)
        for wanted in (noticed(seconds_to_live), taken_up_again()):
            same = client.read_automations_by_name(wanted.name)
            if same:
                client.update_automation(same[0].id, wanted)
            else:
                client.create_automation(wanted)
    return {"queue": queue}


def noticed(seconds: int) -> AutomationCore:
    """The rule: a run at work that gives no sign of life is lost.

    A last heartbeat may come in after the end of its run, and nothing follows it. So the state is
    not forced: Prefect takes no run that has ended for crashed, but would schedule one again.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.schemas.automations import Posture

    alive = "prefect.flow-run.heartbeat"
    ended = {
        f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")
    }
    return _rule(
        "p2d: notice a kill",
        f"A run without a sign of life for {seconds} s is lost.",
        (StateType.CRASHED, LOST, "No sign of life: its worker is gone."),
        after={alive},
        expect={alive} | ended,
        posture=Posture.Proactive,
        within=timedelta(seconds=seconds),
    )


def taken_up_again() -> AutomationCore:
    """The rule: a lost run is scheduled again, for whichever worker is there.

    What it had finished is in the store, so it goes on from there.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.schemas.automations import Posture

    return _rule(
        "p2d: go on after a kill",
        "A lost run is scheduled again; it goes on from what it had finished.",
        (StateType.SCHEDULED, "AwaitingRetry", "It goes on from what was finished."),
        expect={f"prefect.flow-run.{LOST}"},
        posture=Posture.Reactive,
        within=timedelta(0),
    )


def _rule(
    name: str, description: str, state: tuple[StateType, str, str], **trigger: Any
) -> AutomationCore:
    """Of every single run of ours, to a state of this type, name and message."""
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger
    from prefect.events.schemas.events import ResourceSpecification

    kind, called, message = state
    return AutomationCore(
        name=name,
        description=description,
        enabled=True,
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
            ),
            for_each={"prefect.resource.id"},
            threshold=1,
            **trigger,
        ),
        actions=[ChangeFlowRunState(state=kind, name=called, message=message)],
    )
