"""What `prefect deploy` makes at the server beside the deployments: a queue, an automation.

Named as a build step in `deployment.yaml`; doing it again changes nothing.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from prefect import get_client

if TYPE_CHECKING:
    from prefect.events.schemas.automations import AutomationCore

TAG = "p2d"
"""What every deployment of `deployment.yaml` is tagged with."""
GO_ON_AFTER_A_KILL = "p2d: go on after a kill"
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
        wanted = taken_up_again(seconds_to_live)
        same = client.read_automations_by_name(wanted.name)
        if same:
            client.update_automation(same[0].id, wanted)
        else:
            client.create_automation(wanted)
    return {"queue": queue}


def taken_up_again(seconds: int) -> AutomationCore:
    """The rule: a run that gives no sign of life is scheduled again, for whichever worker is there.

    What it had finished is in the store, so it goes on from there.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    alive = "prefect.flow-run.heartbeat"
    ended = {
        f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")
    }
    return AutomationCore(
        name=GO_ON_AFTER_A_KILL,
        description=f"A run without a sign of life for {seconds} s is scheduled again; "
        "it goes on from what it had finished.",
        enabled=True,
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
            ),
            for_each={"prefect.resource.id"},
            after={alive},
            expect={alive} | ended,
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name="AwaitingRetry",
                message="No sign of life: its worker is gone. It goes on from what was finished.",
                force=True,
            )
        ],
    )
