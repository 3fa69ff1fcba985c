"""Without a guard its story goes red: so the fault tests, which hold with all of them, can fail. `make controls` plays both."""

import pytest
from controls import CONTROLS, played


@pytest.mark.parametrize("control", CONTROLS, ids=[control.guard for control in CONTROLS])
def test_without_its_guard_a_story_violates_its_invariant(laboratory, control):
    async def story(lab):
        violated = {verdict.name for verdict in await played(lab, control, control.guard) if not verdict.ok}
        assert control.red in violated

    laboratory(story, **control.options)
