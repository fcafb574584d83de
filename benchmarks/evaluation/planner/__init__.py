"""The planner beside every fixed split of the same members, simulated."""
