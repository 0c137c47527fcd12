"""The views that users read, in SQLite's dialect: the public surface of the database.

Each answers by key, type, agent or id without a scan; a test looks at the query plans. The range conditions
on ids beside an equality (`c.id > t.change_id …`) let the planner walk either way: from a change to its tick,
or from the ticks of an agent to their changes. Each revision in `migrations/` carries a frozen copy of the
views of its time; this is the newest.
"""

from __future__ import annotations

from ael_store.schema.recent import is_recent

__all__ = ["ABOUT", "VIEWS"]

YEAR_1_S = 62_135_596_800
"""Seconds from the year 1 to 1970."""


def _time(column: str) -> str:
    """ISO-8601 UTC text with microseconds of a column in microseconds.

    Counted from the year 1 and not from 1970, because SQLite's `/` and `%` round towards zero: before 1970 they would
    give a second too much and a negative fraction.
    """
    since_year_1 = f"({column} + {YEAR_1_S}000000)"
    return (
        f"strftime('%Y-%m-%dT%H:%M:%S', {since_year_1} / 1000000 - {YEAR_1_S}, 'unixepoch') "
        f"|| printf('.%06dZ', {since_year_1} % 1000000)"
    )


def _milliseconds(column: str) -> str:
    return f"{column} / 1000.0"


NOW = "(CAST(strftime('%s', 'now') AS INTEGER) * 1000000)"

NOW_US = "CAST((julianday('now') - 2440587.5) * 86400000000.0 AS INTEGER)"
"""The same to the millisecond."""

KIND = (
    "CASE t.kind WHEN 0 THEN 'tick' WHEN 1 THEN 'event' WHEN 2 THEN 'start' WHEN 3 THEN 'error' "
    "WHEN 4 THEN 'shutdown' WHEN 5 THEN 'task' ELSE 'outside' END"
)
OUTCOME = (
    "CASE t.outcome WHEN 0 THEN 'success' WHEN 1 THEN 'error' WHEN 2 THEN 'timeout' "
    "WHEN 3 THEN 'conflict' ELSE 'cancelled' END"
)
CAUSE = "CASE WHEN t.cause_event_id IS NOT NULL THEN 'event' WHEN t.cause_task_id IS NOT NULL THEN 'task' END"
CAUSE_ID = "coalesce(t.cause_event_id, t.cause_task_id)"


def _indexed_and_recent(select: str, table: str, alias: str, also: str = "") -> str:
    """Return a question to a table of history twice: to what its indexes have, and to the recent rows.

    `also` is what else holds of the first.
    """
    return f"{select} WHERE {alias}.recent IS NULL{also}\n        UNION ALL{select} WHERE {is_recent(table, alias)}"


VIEWS: dict[str, str] = {
    "v_state": f"""
        SELECT k.name AS key, s.value AS value, s.version AS version, a.name AS agent,
               t.iteration AS iteration, {_time("t.started_us")} AS updated_at
        FROM state s
        JOIN keys k ON k.id = s.key_id
        JOIN agents a ON a.id = s.agent_id
        LEFT JOIN state_changes c ON c.id = s.change_id
        LEFT JOIN ticks t ON t.id = c.tick_id""",
    "v_state_history": _indexed_and_recent(
        f"""
        SELECT c.id AS id, k.name AS key, CASE WHEN c.value IS NULL THEN 'delete' ELSE 'set' END AS operation,
               p.value AS old_value, c.value AS new_value, a.name AS agent, t.iteration AS iteration,
               {_time("t.started_us")} AS changed_at
        FROM state_changes c
        JOIN keys k ON k.id = c.key_id
        JOIN ticks t ON t.id = c.tick_id AND c.id > t.change_id AND c.id <= t.change_id + t.changes
        JOIN agents a ON a.id = t.agent_id
        LEFT JOIN state_changes p ON p.id = c.previous_id
       """,
        "state_changes",
        "c",
        also=" AND t.recent IS NULL",
    ),
    "v_events": _indexed_and_recent(
        f"""
        SELECT e.id AS id, y.name AS type, o.name AS source, e.data AS data,
               coalesce(e.metadata, '{{}}') AS metadata, t.iteration AS iteration,
               {_time("coalesce(e.timestamp_us, t.started_us)")} AS emitted_at
        FROM events e
        JOIN event_types y ON y.id = e.type_id
        JOIN event_sources o ON o.id = e.source_id
        LEFT JOIN ticks t ON t.id = e.tick_id
       """,
        "events",
        "e",
    ),
    "v_agents": f"""
        SELECT a.name AS name, a.priority AS priority, a.enabled AS enabled,
               CASE WHEN a.registered = 0 THEN 'absent' WHEN a.enabled = 0 THEN 'disabled'
                    WHEN a.quarantined_us IS NOT NULL THEN 'quarantined' ELSE 'active' END AS status,
               s.ticks AS tick_count, s.errors AS error_count, s.events AS event_count,
               CASE WHEN s.measured > 0 THEN s.total_us / 1000.0 / s.measured END AS mean_duration_ms,
               CASE WHEN s.measured > 0 THEN {_milliseconds("s.max_us")} END AS max_duration_ms,
               {_time("s.last_tick_us")} AS last_tick_at, a.last_error AS last_error, a.metadata AS metadata
        FROM agents a
        JOIN agent_stats s ON s.agent_id = a.id
        WHERE a.id > 0""",
    "v_ticks": _indexed_and_recent(
        f"""
        SELECT t.id AS id, a.name AS agent, t.iteration AS iteration, {KIND} AS kind, {OUTCOME} AS outcome,
               {_time("t.started_us")} AS started_at, {_milliseconds("t.duration_us")} AS duration_ms,
               x.type || ': ' || x.message AS error
        FROM ticks t
        JOIN agents a ON a.id = t.agent_id
        LEFT JOIN tick_errors x ON x.tick_id = t.id
       """,
        "ticks",
        "t",
    ),
    "v_iterations": f"""
        SELECT i.id AS iteration, i.run_id AS run_id, {_time("i.started_us")} AS started_at,
               {_milliseconds("i.duration_us")} AS duration_ms, i.ticks AS ticks, i.errors AS errors,
               i.events AS events, i.missed AS missed
        FROM iterations i""",
    "v_runs": f"""
        SELECT r.id AS run_id, r.status AS status, {_time("r.started_us")} AS started_at,
               {_time("r.ended_us")} AS ended_at,
               CASE WHEN coalesce(r.last_iteration, (SELECT max(id) FROM iterations)) >= r.first_iteration
                    THEN r.first_iteration END AS first_iteration,
               CASE WHEN coalesce(r.last_iteration, (SELECT max(id) FROM iterations)) >= r.first_iteration
                    THEN coalesce(r.last_iteration, (SELECT max(id) FROM iterations)) END AS last_iteration,
               r.pid AS pid, r.host AS host, r.version AS version
        FROM runs r""",
    "v_pending": f"""
        SELECT s.subscriber AS subscriber, e.id AS event_id, y.name AS type,
               CASE WHEN e.id = s.attempt_event_id THEN s.attempts ELSE 0 END AS attempts
        FROM subscriptions s
        CROSS JOIN event_types y
        CROSS JOIN events e ON e.type_id = y.id AND e.id > s.cursor
        WHERE s.ended_us IS NULL AND e.target_id IS NULL AND e.recent IS NULL
          AND EXISTS (SELECT 1 FROM subscription_patterns p
                      WHERE p.subscription_id = s.id AND y.name GLOB p.glob)
        UNION ALL
        SELECT s.subscriber, e.id, y.name, CASE WHEN e.id = s.attempt_event_id THEN s.attempts ELSE 0 END
        FROM subscriptions s
        CROSS JOIN events e ON e.id > s.cursor
        CROSS JOIN event_types y ON y.id = e.type_id
        WHERE s.ended_us IS NULL AND e.target_id IS NULL AND {is_recent("events", "e")}
          AND EXISTS (SELECT 1 FROM subscription_patterns p
                      WHERE p.subscription_id = s.id AND y.name GLOB p.glob)
        UNION ALL
        SELECT s.subscriber, e.id, y.name, CASE WHEN e.id = s.attempt_event_id THEN s.attempts ELSE 0 END
        FROM subscriptions s
        CROSS JOIN event_sources o ON o.name = s.subscriber
        CROSS JOIN events e ON e.target_id = o.id AND e.id > s.cursor
        CROSS JOIN event_types y ON y.id = e.type_id
        WHERE s.ended_us IS NULL
          AND (s.agent_id IS NOT NULL
               OR EXISTS (SELECT 1 FROM subscription_patterns p
                          WHERE p.subscription_id = s.id AND y.name GLOB p.glob))""",
    "v_dead_letters": f"""
        SELECT s.subscriber AS subscriber, d.event_id AS event_id, y.name AS type, d.attempts AS attempts,
               d.error AS error, {_time("d.failed_us")} AS failed_at
        FROM dead_letters d
        JOIN subscriptions s ON s.id = d.subscription_id
        JOIN events e ON e.id = d.event_id
        JOIN event_types y ON y.id = e.type_id
        WHERE d.redelivered_us IS NULL AND s.ended_us IS NULL""",
    "v_tasks": f"""
        SELECT q.id AS id, a.name AS agent, q.name AS name, q.key AS key,
               CASE WHEN q.status = 'waiting' AND l.blocked_us IS NOT NULL AND coalesce(q.next_us, 0) <= {NOW}
                    THEN 'held' ELSE q.status END AS status,
               q.attempts AS attempts, q.priority AS priority, q.limit_name AS limit_name, q.args AS args,
               q.result AS result, q.error AS error, CAST(q.cost_usd AS REAL) AS cost_usd,
               {_time("q.created_us")} AS created_at, {_time("q.next_us")} AS next_at,
               {_time("q.started_us")} AS started_at, {_time("q.ended_us")} AS ended_at,
               t.iteration AS iteration
        FROM tasks q
        JOIN agents a ON a.id = q.agent_id
        LEFT JOIN ticks t ON t.id = q.tick_id
        LEFT JOIN limits l ON l.name = q.limit_name""",
    "v_limits": f"""
        SELECT l.name AS name,
               CASE WHEN l.held_until_us > {NOW} THEN 'held' WHEN l.blocked_us IS NOT NULL THEN 'full'
                    ELSE 'open' END AS status,
               CASE WHEN l.held_until_us > {NOW} THEN l.held_because ELSE l.blocked_because END AS reason,
               CASE WHEN l.held_until_us > {NOW} THEN {_time("l.held_until_us")}
                    WHEN l.blocked_us IS NOT NULL THEN {_time("l.blocked_until_us")} END AS until,
               l.concurrency AS concurrency, l.per_minute AS per_minute, l.per_day AS per_day,
               CAST(l.usd_per_day AS REAL) AS usd_per_day,
               (SELECT count(*) FROM task_attempts x WHERE x.ended_us IS NULL AND x.limit_name = l.name) AS running,
               (SELECT count(*) FROM tasks q
                WHERE q.applied_us IS NULL AND q.status = 'waiting' AND q.limit_name = l.name) AS waiting,
               (SELECT count(*) FROM task_attempts x
                WHERE x.limit_name = l.name AND x.started_us > {NOW_US} - 60000000) AS started_last_minute,
               (SELECT count(*) FROM task_attempts x
                WHERE x.limit_name = l.name AND x.started_us >= {NOW} / 86400000000 * 86400000000) AS started_today,
               (SELECT coalesce(sum(CASE WHEN x.outcome IN ('done', 'failed', 'postponed') THEN CAST(x.cost_usd AS REAL)
                    ELSE max(coalesce(CAST(x.cost_usd AS REAL), 0.0), coalesce(CAST(x.reserved_usd AS REAL), 0.0))
                    END), 0.0) FROM task_attempts x
                WHERE x.limit_name = l.name AND x.started_us >= {NOW} / 86400000000 * 86400000000) AS usd_today
        FROM limits l""",
    "v_agent_hours": f"""
        SELECT a.name AS agent, {_time("m.hour_us")} AS hour,
               m.ticks - coalesce(m.ticks_before, 0) AS ticks, m.errors - coalesce(m.errors_before, 0) AS errors,
               m.events - coalesce(m.events_before, 0) AS events,
               CASE WHEN m.measured > coalesce(m.measured_before, 0)
                    THEN (m.total_us - coalesce(m.total_before, 0)) / 1000.0
                         / (m.measured - coalesce(m.measured_before, 0)) END AS mean_duration_ms
        FROM (SELECT agent_id, hour_us, ticks, errors, events, measured, total_us,
                     lag(ticks) OVER of_agent AS ticks_before, lag(errors) OVER of_agent AS errors_before,
                     lag(events) OVER of_agent AS events_before, lag(measured) OVER of_agent AS measured_before,
                     lag(total_us) OVER of_agent AS total_before
              FROM agent_marks WINDOW of_agent AS (PARTITION BY agent_id ORDER BY hour_us)) m
        JOIN agents a ON a.id = m.agent_id""",
    "v_causes": " UNION ALL ".join(
        (
            _indexed_and_recent(
                f"""
        SELECT 'change' AS effect, c.id AS effect_id, k.name AS subject, a.name AS agent, t.iteration AS iteration,
               t.id AS unit_id, {KIND} AS unit_kind, {CAUSE} AS cause, {CAUSE_ID} AS cause_id
        FROM state_changes c
        JOIN keys k ON k.id = c.key_id
        JOIN ticks t ON t.id = c.tick_id
        JOIN agents a ON a.id = t.agent_id
       """,
                "state_changes",
                "c",
            ),
            _indexed_and_recent(
                f"""
        SELECT 'event', e.id, y.name, a.name, t.iteration, t.id, {KIND}, {CAUSE}, {CAUSE_ID}
        FROM events e
        JOIN event_types y ON y.id = e.type_id
        JOIN ticks t ON t.id = e.tick_id
        JOIN agents a ON a.id = t.agent_id
       """,
                "events",
                "e",
            ),
            f"""
        SELECT 'task', q.id, q.name, a.name, t.iteration, t.id, {KIND}, {CAUSE}, {CAUSE_ID}
        FROM tasks q
        JOIN ticks t ON t.id = q.tick_id
        JOIN agents a ON a.id = t.agent_id""",
        )
    ),
    "v_metrics": f"""
        SELECT s.id AS id, m.channel AS channel, m.name AS name, m.kind AS kind, s.value AS value,
               a.name AS agent, s.iteration AS iteration, {_time("s.at_us")} AS recorded_at
        FROM metric_samples s
        JOIN metrics m ON m.id = s.metric_id
        JOIN agents a ON a.id = s.agent_id""",
    "v_metric_hours": f"""
        SELECT m.channel AS channel, m.name AS name, m.kind AS kind, {_time("h.hour_us")} AS hour,
               h.samples AS samples, h.total AS total, h.total / h.samples AS mean, h.least AS min, h.most AS max,
               h.last AS last
        FROM metric_hours h
        JOIN metrics m ON m.id = h.metric_id
        UNION ALL
        SELECT m.channel, m.name, m.kind, {_time("m.hour_us")}, m.hour_samples, m.hour_total,
               m.hour_total / m.hour_samples, m.hour_least, m.hour_most, m.value
        FROM metrics m""",
    "v_metric_series": f"""
        SELECT m.channel AS channel, m.name AS name, m.kind AS kind,
               CASE m.kind WHEN 'counter' THEN m.total ELSE m.value END AS value, m.samples AS samples,
               m.total AS total, {_time("m.updated_us")} AS updated_at
        FROM metrics m""",
    "v_problems": f"""
        SELECT 'crashed_run' AS kind, 'run ' || r.id AS subject,
               'pid ' || r.pid || ' on ' || r.host || ' ended without a clean stop' AS detail,
               {_time("r.ended_us")} AS since
        FROM runs r
        WHERE r.status = 'crashed' AND r.ended_us > {NOW} - 86400000000
        UNION ALL
        SELECT 'quarantined_agent', a.name,
               CASE WHEN a.failures > 0 THEN a.failures || ' errors in a row; last: '
                    WHEN a.deaths > 0 THEN a.deaths || ' deaths of the process in a row; last: '
                    ELSE '' END || coalesce(a.last_error, ''),
               {_time("a.quarantined_us")}
        FROM agents a WHERE a.quarantined_us IS NOT NULL
        UNION ALL
        SELECT 'failing_agent', a.name, a.failures || ' errors in a row; last: ' || coalesce(a.last_error, ''),
               {_time("a.last_error_us")}
        FROM agents a WHERE a.quarantined_us IS NULL AND a.retry_us IS NOT NULL AND a.registered = 1
        UNION ALL
        SELECT 'dead_letters', s.subscriber, count(*) || ' deliveries were given up; last: ' || max(d.error),
               {_time("min(d.failed_us)")}
        FROM dead_letters d JOIN subscriptions s ON s.id = d.subscription_id
        WHERE d.redelivered_us IS NULL AND s.ended_us IS NULL
        GROUP BY s.subscriber
        UNION ALL
        SELECT 'lagging_subscriber', p.subscriber, p.waiting || ' events wait',
               {_time("coalesce(e.timestamp_us, t.started_us)")}
        FROM (SELECT subscriber, count(*) AS waiting, min(event_id) AS first FROM v_pending GROUP BY subscriber) p
        JOIN events e ON e.id = p.first
        LEFT JOIN ticks t ON t.id = e.tick_id
        WHERE coalesce(e.timestamp_us, t.started_us) < {NOW} - 300000000
        UNION ALL
        SELECT 'expired_subscriber', s.subscriber,
               s.skipped || ' events were skipped because it was away too long', {_time("s.seen_us")}
        FROM subscriptions s WHERE s.skipped > 0 AND s.ended_us IS NULL
        UNION ALL
        SELECT 'overrun', 'loop', o.lost || ' slots of the clock were lost in the last hour', {_time("o.first")}
        FROM (SELECT sum(i.missed) AS lost, min(i.started_us) AS first FROM iterations i
              WHERE i.missed > 0 AND i.id > (SELECT max(id) FROM iterations) - 36000
                AND i.started_us > {NOW} - 3600000000) o
        WHERE o.lost > 0
        UNION ALL
        SELECT 'paused_loop', 'loop', trim(p.value, '"'), {_time("CAST(s.value AS INTEGER)")}
        FROM positions p LEFT JOIN positions s ON s.name = 'paused_since'
        WHERE p.name = 'paused_because' AND p.value <> 'null'
        UNION ALL
        SELECT 'limit_reached', l.name,
               count(q.id) || CASE WHEN count(q.id) = 1 THEN ' task waits: ' ELSE ' tasks wait: ' END
               || CASE WHEN l.held_until_us > {NOW} THEN l.held_because ELSE l.blocked_because END,
               {_time("l.blocked_us")}
        FROM limits l
        LEFT JOIN tasks q ON q.applied_us IS NULL AND q.status = 'waiting' AND q.limit_name = l.name
        WHERE l.blocked_us IS NOT NULL
        GROUP BY l.name
        UNION ALL
        SELECT 'unknown_limit', l.name, 'tasks name this limit and no setting says what it allows: nothing bounds them',
               NULL
        FROM limits l
        WHERE l.configured = 'null' AND l.raised = '{{}}'
          AND EXISTS (SELECT 1 FROM tasks q WHERE q.applied_us IS NULL AND q.limit_name = l.name)
        UNION ALL
        SELECT 'held_tasks', q.held, count(*) || CASE WHEN count(*) = 1 THEN ' task is held; ' ELSE ' tasks are held; '
               END || 'the first is ' || min(q.id), {_time("min(q.created_us)")}
        FROM tasks q WHERE q.applied_us IS NULL AND q.status = 'held'
        GROUP BY q.held
        UNION ALL
        SELECT 'question', 'task ' || q.id, q.question, {_time("q.created_us")}
        FROM tasks q WHERE q.applied_us IS NULL AND q.kind = 'question' AND q.status = 'waiting'
        UNION ALL
        SELECT 'unapplied_result', 'task ' || q.id, a.name || ' could not take it up: ' || q.apply_error,
               {_time("q.ended_us")}
        FROM tasks q JOIN agents a ON a.id = q.agent_id
        WHERE q.applied_us IS NULL AND q.apply_error IS NOT NULL AND q.held IS NOT NULL
        UNION ALL
        SELECT 'failed_tasks', q.name, count(*) || ' failed in the last 24 hours; the last is ' || max(q.id) || ': '
               || coalesce(max(q.error), ''), {_time("min(q.ended_us)")}
        FROM tasks q
        WHERE q.status = 'failed' AND q.id > (SELECT max(id) FROM tasks) - 10000 AND q.ended_us > {NOW} - 86400000000
        GROUP BY q.name""",
}
VIEWS = {name: text.strip() for name, text in VIEWS.items()}

ABOUT = {
    "v_state": "The current value of each key.",
    "v_state_history": "Every change of the state.",
    "v_events": "Every event.",
    "v_agents": "Every agent that this database has known.",
    "v_ticks": "One row for each unit of work that changed, emitted or consumed something, failed, or was slow.",
    "v_iterations": "One row for each iteration.",
    "v_runs": "One row for each life of a process that owned the loop.",
    "v_pending": "Deliveries that wait: one row for each subscriber and event, also of subscribers that are away.",
    "v_dead_letters": "Deliveries that were given up, and not made up for since; `ael events redeliver` does that.",
    "v_problems": "What a person should look at now; empty when all is well.",
    "v_tasks": "Durable tasks, and questions to people.",
    "v_limits": "What tasks may use of something, and what they have used.",
    "v_agent_hours": "What each agent did in each hour, also of hours whose history was removed.",
    "v_metrics": "What agents have recorded of their metrics, sample by sample.",
    "v_metric_hours": "Each hour of each metric, also hours whose samples were removed, and the one that is not over.",
    "v_metric_series": "Every metric, and what it stands at.",
    "v_causes": "What caused each change, event and task: the unit that made it, and what that unit was handling.",
}
"""What each view holds, as its page in `docs/reference/views.md` begins."""
