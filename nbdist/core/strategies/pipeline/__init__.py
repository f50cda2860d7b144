"""Pipeline parallelism: schedules, and the rank that executes one."""
