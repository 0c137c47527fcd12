-- The views of revision 0008, frozen: a change of a view is a new revision with a file of its own.

CREATE VIEW v_state AS
SELECT k.name AS key, s.value AS value, s.version AS version, a.name AS agent,
       t.iteration AS iteration, strftime('%Y-%m-%dT%H:%M:%S', (t.started_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (t.started_us + 62135596800000000) % 1000000) AS updated_at
FROM state s
JOIN keys k ON k.id = s.key_id
JOIN agents a ON a.id = s.agent_id
LEFT JOIN state_changes c ON c.id = s.change_id
LEFT JOIN ticks t ON t.id = c.tick_id;

CREATE VIEW v_state_history AS
SELECT c.id AS id, k.name AS key, CASE WHEN c.value IS NULL THEN 'delete' ELSE 'set' END AS operation,
       p.value AS old_value, c.value AS new_value, a.name AS agent, t.iteration AS iteration,
       strftime('%Y-%m-%dT%H:%M:%S', (t.started_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (t.started_us + 62135596800000000) % 1000000) AS changed_at
FROM state_changes c
JOIN keys k ON k.id = c.key_id
JOIN ticks t ON t.id = c.tick_id AND c.id > t.change_id AND c.id <= t.change_id + t.changes
JOIN agents a ON a.id = t.agent_id
LEFT JOIN state_changes p ON p.id = c.previous_id
WHERE c.recent IS NULL AND t.recent IS NULL
UNION ALL
SELECT c.id AS id, k.name AS key, CASE WHEN c.value IS NULL THEN 'delete' ELSE 'set' END AS operation,
       p.value AS old_value, c.value AS new_value, a.name AS agent, t.iteration AS iteration,
       strftime('%Y-%m-%dT%H:%M:%S', (t.started_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (t.started_us + 62135596800000000) % 1000000) AS changed_at
FROM state_changes c
JOIN keys k ON k.id = c.key_id
JOIN ticks t ON t.id = c.tick_id AND c.id > t.change_id AND c.id <= t.change_id + t.changes
JOIN agents a ON a.id = t.agent_id
LEFT JOIN state_changes p ON p.id = c.previous_id
WHERE c.recent = 1 AND c.id > coalesce((SELECT id FROM state_changes WHERE recent IS NULL AND id > 0 ORDER BY id DESC LIMIT 1), 0);

CREATE VIEW v_events AS
SELECT e.id AS id, y.name AS type, o.name AS source, e.data AS data,
       coalesce(e.metadata, '{}') AS metadata, t.iteration AS iteration,
       strftime('%Y-%m-%dT%H:%M:%S', (coalesce(e.timestamp_us, t.started_us) + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (coalesce(e.timestamp_us, t.started_us) + 62135596800000000) % 1000000) AS emitted_at
FROM events e
JOIN event_types y ON y.id = e.type_id
JOIN event_sources o ON o.id = e.source_id
LEFT JOIN ticks t ON t.id = e.tick_id
WHERE e.recent IS NULL
UNION ALL
SELECT e.id AS id, y.name AS type, o.name AS source, e.data AS data,
       coalesce(e.metadata, '{}') AS metadata, t.iteration AS iteration,
       strftime('%Y-%m-%dT%H:%M:%S', (coalesce(e.timestamp_us, t.started_us) + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (coalesce(e.timestamp_us, t.started_us) + 62135596800000000) % 1000000) AS emitted_at
FROM events e
JOIN event_types y ON y.id = e.type_id
JOIN event_sources o ON o.id = e.source_id
LEFT JOIN ticks t ON t.id = e.tick_id
WHERE e.recent = 1 AND e.id > coalesce((SELECT id FROM events WHERE recent IS NULL AND id > 0 ORDER BY id DESC LIMIT 1), 0);

CREATE VIEW v_agents AS
SELECT a.name AS name, a.priority AS priority, a.enabled AS enabled,
       CASE WHEN a.registered = 0 THEN 'absent' WHEN a.enabled = 0 THEN 'disabled'
            WHEN a.quarantined_us IS NOT NULL THEN 'quarantined' ELSE 'active' END AS status,
       s.ticks AS tick_count, s.errors AS error_count, s.events AS event_count,
       CASE WHEN s.measured > 0 THEN s.total_us / 1000.0 / s.measured END AS mean_duration_ms,
       CASE WHEN s.measured > 0 THEN s.max_us / 1000.0 END AS max_duration_ms,
       strftime('%Y-%m-%dT%H:%M:%S', (s.last_tick_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (s.last_tick_us + 62135596800000000) % 1000000) AS last_tick_at, a.last_error AS last_error, a.metadata AS metadata
FROM agents a
JOIN agent_stats s ON s.agent_id = a.id
WHERE a.id > 0;

CREATE VIEW v_ticks AS
SELECT t.id AS id, a.name AS agent, t.iteration AS iteration, CASE t.kind WHEN 0 THEN 'tick' WHEN 1 THEN 'event' WHEN 2 THEN 'start' WHEN 3 THEN 'error' WHEN 4 THEN 'shutdown' WHEN 5 THEN 'task' ELSE 'outside' END AS kind, CASE t.outcome WHEN 0 THEN 'success' WHEN 1 THEN 'error' WHEN 2 THEN 'timeout' WHEN 3 THEN 'conflict' ELSE 'cancelled' END AS outcome,
       strftime('%Y-%m-%dT%H:%M:%S', (t.started_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (t.started_us + 62135596800000000) % 1000000) AS started_at, t.duration_us / 1000.0 AS duration_ms,
       x.type || ': ' || x.message AS error
FROM ticks t
JOIN agents a ON a.id = t.agent_id
LEFT JOIN tick_errors x ON x.tick_id = t.id
WHERE t.recent IS NULL
UNION ALL
SELECT t.id AS id, a.name AS agent, t.iteration AS iteration, CASE t.kind WHEN 0 THEN 'tick' WHEN 1 THEN 'event' WHEN 2 THEN 'start' WHEN 3 THEN 'error' WHEN 4 THEN 'shutdown' WHEN 5 THEN 'task' ELSE 'outside' END AS kind, CASE t.outcome WHEN 0 THEN 'success' WHEN 1 THEN 'error' WHEN 2 THEN 'timeout' WHEN 3 THEN 'conflict' ELSE 'cancelled' END AS outcome,
       strftime('%Y-%m-%dT%H:%M:%S', (t.started_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (t.started_us + 62135596800000000) % 1000000) AS started_at, t.duration_us / 1000.0 AS duration_ms,
       x.type || ': ' || x.message AS error
FROM ticks t
JOIN agents a ON a.id = t.agent_id
LEFT JOIN tick_errors x ON x.tick_id = t.id
WHERE t.recent = 1 AND t.id > coalesce((SELECT id FROM ticks WHERE recent IS NULL AND id > 0 ORDER BY id DESC LIMIT 1), 0);

CREATE VIEW v_iterations AS
SELECT i.id AS iteration, i.run_id AS run_id, strftime('%Y-%m-%dT%H:%M:%S', (i.started_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (i.started_us + 62135596800000000) % 1000000) AS started_at,
       i.duration_us / 1000.0 AS duration_ms, i.ticks AS ticks, i.errors AS errors,
       i.events AS events, i.missed AS missed
FROM iterations i;

CREATE VIEW v_runs AS
SELECT r.id AS run_id, r.status AS status, strftime('%Y-%m-%dT%H:%M:%S', (r.started_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (r.started_us + 62135596800000000) % 1000000) AS started_at,
       strftime('%Y-%m-%dT%H:%M:%S', (r.ended_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (r.ended_us + 62135596800000000) % 1000000) AS ended_at,
       CASE WHEN coalesce(r.last_iteration, (SELECT max(id) FROM iterations)) >= r.first_iteration
            THEN r.first_iteration END AS first_iteration,
       CASE WHEN coalesce(r.last_iteration, (SELECT max(id) FROM iterations)) >= r.first_iteration
            THEN coalesce(r.last_iteration, (SELECT max(id) FROM iterations)) END AS last_iteration,
       r.pid AS pid, r.host AS host, r.version AS version
FROM runs r;

CREATE VIEW v_pending AS
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
WHERE s.ended_us IS NULL AND e.target_id IS NULL AND e.recent = 1 AND e.id > coalesce((SELECT id FROM events WHERE recent IS NULL AND id > 0 ORDER BY id DESC LIMIT 1), 0)
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
                  WHERE p.subscription_id = s.id AND y.name GLOB p.glob));

CREATE VIEW v_dead_letters AS
SELECT s.subscriber AS subscriber, d.event_id AS event_id, y.name AS type, d.attempts AS attempts,
       d.error AS error, strftime('%Y-%m-%dT%H:%M:%S', (d.failed_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (d.failed_us + 62135596800000000) % 1000000) AS failed_at
FROM dead_letters d
JOIN subscriptions s ON s.id = d.subscription_id
JOIN events e ON e.id = d.event_id
JOIN event_types y ON y.id = e.type_id
WHERE d.redelivered_us IS NULL AND s.ended_us IS NULL;

CREATE VIEW v_tasks AS
SELECT q.id AS id, a.name AS agent, q.name AS name, q.key AS key,
       CASE WHEN q.status = 'waiting' AND l.blocked_us IS NOT NULL AND coalesce(q.next_us, 0) <= (CAST(strftime('%s', 'now') AS INTEGER) * 1000000)
            THEN 'held' ELSE q.status END AS status,
       q.attempts AS attempts, q.priority AS priority, q.limit_name AS limit_name, q.args AS args,
       q.result AS result, q.error AS error, CAST(q.cost_usd AS REAL) AS cost_usd,
       strftime('%Y-%m-%dT%H:%M:%S', (q.created_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (q.created_us + 62135596800000000) % 1000000) AS created_at, strftime('%Y-%m-%dT%H:%M:%S', (q.next_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (q.next_us + 62135596800000000) % 1000000) AS next_at,
       strftime('%Y-%m-%dT%H:%M:%S', (q.started_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (q.started_us + 62135596800000000) % 1000000) AS started_at, strftime('%Y-%m-%dT%H:%M:%S', (q.ended_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (q.ended_us + 62135596800000000) % 1000000) AS ended_at,
       t.iteration AS iteration
FROM tasks q
JOIN agents a ON a.id = q.agent_id
LEFT JOIN ticks t ON t.id = q.tick_id
LEFT JOIN limits l ON l.name = q.limit_name;

CREATE VIEW v_limits AS
SELECT l.name AS name,
       CASE WHEN l.held_until_us > (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) THEN 'held' WHEN l.blocked_us IS NOT NULL THEN 'full'
            ELSE 'open' END AS status,
       CASE WHEN l.held_until_us > (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) THEN l.held_because ELSE l.blocked_because END AS reason,
       CASE WHEN l.held_until_us > (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) THEN strftime('%Y-%m-%dT%H:%M:%S', (l.held_until_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (l.held_until_us + 62135596800000000) % 1000000)
            WHEN l.blocked_us IS NOT NULL THEN strftime('%Y-%m-%dT%H:%M:%S', (l.blocked_until_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (l.blocked_until_us + 62135596800000000) % 1000000) END AS until,
       l.concurrency AS concurrency, l.per_minute AS per_minute, l.per_day AS per_day,
       CAST(l.usd_per_day AS REAL) AS usd_per_day,
       (SELECT count(*) FROM task_attempts x WHERE x.ended_us IS NULL AND x.limit_name = l.name) AS running,
       (SELECT count(*) FROM tasks q
        WHERE q.applied_us IS NULL AND q.status = 'waiting' AND q.limit_name = l.name) AS waiting,
       (SELECT count(*) FROM task_attempts x
        WHERE x.limit_name = l.name AND x.started_us > CAST((julianday('now') - 2440587.5) * 86400000000.0 AS INTEGER) - 60000000) AS started_last_minute,
       (SELECT count(*) FROM task_attempts x
        WHERE x.limit_name = l.name AND x.started_us >= (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) / 86400000000 * 86400000000) AS started_today,
       (SELECT coalesce(sum(CASE WHEN x.outcome IN ('done', 'failed', 'postponed') THEN CAST(x.cost_usd AS REAL)
            ELSE max(coalesce(CAST(x.cost_usd AS REAL), 0.0), coalesce(CAST(x.reserved_usd AS REAL), 0.0))
            END), 0.0) FROM task_attempts x
        WHERE x.limit_name = l.name AND x.started_us >= (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) / 86400000000 * 86400000000) AS usd_today
FROM limits l;

CREATE VIEW v_agent_hours AS
SELECT a.name AS agent, strftime('%Y-%m-%dT%H:%M:%S', (m.hour_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (m.hour_us + 62135596800000000) % 1000000) AS hour,
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
JOIN agents a ON a.id = m.agent_id;

CREATE VIEW v_causes AS
SELECT 'change' AS effect, c.id AS effect_id, k.name AS subject, a.name AS agent, t.iteration AS iteration,
       t.id AS unit_id, CASE t.kind WHEN 0 THEN 'tick' WHEN 1 THEN 'event' WHEN 2 THEN 'start' WHEN 3 THEN 'error' WHEN 4 THEN 'shutdown' WHEN 5 THEN 'task' ELSE 'outside' END AS unit_kind, CASE WHEN t.cause_event_id IS NOT NULL THEN 'event' WHEN t.cause_task_id IS NOT NULL THEN 'task' END AS cause, coalesce(t.cause_event_id, t.cause_task_id) AS cause_id
FROM state_changes c
JOIN keys k ON k.id = c.key_id
JOIN ticks t ON t.id = c.tick_id
JOIN agents a ON a.id = t.agent_id
WHERE c.recent IS NULL
UNION ALL
SELECT 'change' AS effect, c.id AS effect_id, k.name AS subject, a.name AS agent, t.iteration AS iteration,
       t.id AS unit_id, CASE t.kind WHEN 0 THEN 'tick' WHEN 1 THEN 'event' WHEN 2 THEN 'start' WHEN 3 THEN 'error' WHEN 4 THEN 'shutdown' WHEN 5 THEN 'task' ELSE 'outside' END AS unit_kind, CASE WHEN t.cause_event_id IS NOT NULL THEN 'event' WHEN t.cause_task_id IS NOT NULL THEN 'task' END AS cause, coalesce(t.cause_event_id, t.cause_task_id) AS cause_id
FROM state_changes c
JOIN keys k ON k.id = c.key_id
JOIN ticks t ON t.id = c.tick_id
JOIN agents a ON a.id = t.agent_id
WHERE c.recent = 1 AND c.id > coalesce((SELECT id FROM state_changes WHERE recent IS NULL AND id > 0 ORDER BY id DESC LIMIT 1), 0) UNION ALL
SELECT 'event', e.id, y.name, a.name, t.iteration, t.id, CASE t.kind WHEN 0 THEN 'tick' WHEN 1 THEN 'event' WHEN 2 THEN 'start' WHEN 3 THEN 'error' WHEN 4 THEN 'shutdown' WHEN 5 THEN 'task' ELSE 'outside' END, CASE WHEN t.cause_event_id IS NOT NULL THEN 'event' WHEN t.cause_task_id IS NOT NULL THEN 'task' END, coalesce(t.cause_event_id, t.cause_task_id)
FROM events e
JOIN event_types y ON y.id = e.type_id
JOIN ticks t ON t.id = e.tick_id
JOIN agents a ON a.id = t.agent_id
WHERE e.recent IS NULL
UNION ALL
SELECT 'event', e.id, y.name, a.name, t.iteration, t.id, CASE t.kind WHEN 0 THEN 'tick' WHEN 1 THEN 'event' WHEN 2 THEN 'start' WHEN 3 THEN 'error' WHEN 4 THEN 'shutdown' WHEN 5 THEN 'task' ELSE 'outside' END, CASE WHEN t.cause_event_id IS NOT NULL THEN 'event' WHEN t.cause_task_id IS NOT NULL THEN 'task' END, coalesce(t.cause_event_id, t.cause_task_id)
FROM events e
JOIN event_types y ON y.id = e.type_id
JOIN ticks t ON t.id = e.tick_id
JOIN agents a ON a.id = t.agent_id
WHERE e.recent = 1 AND e.id > coalesce((SELECT id FROM events WHERE recent IS NULL AND id > 0 ORDER BY id DESC LIMIT 1), 0) UNION ALL
SELECT 'task', q.id, q.name, a.name, t.iteration, t.id, CASE t.kind WHEN 0 THEN 'tick' WHEN 1 THEN 'event' WHEN 2 THEN 'start' WHEN 3 THEN 'error' WHEN 4 THEN 'shutdown' WHEN 5 THEN 'task' ELSE 'outside' END, CASE WHEN t.cause_event_id IS NOT NULL THEN 'event' WHEN t.cause_task_id IS NOT NULL THEN 'task' END, coalesce(t.cause_event_id, t.cause_task_id)
FROM tasks q
JOIN ticks t ON t.id = q.tick_id
JOIN agents a ON a.id = t.agent_id;

CREATE VIEW v_metrics AS
SELECT s.id AS id, m.channel AS channel, m.name AS name, m.kind AS kind, s.value AS value,
       a.name AS agent, s.iteration AS iteration, strftime('%Y-%m-%dT%H:%M:%S', (s.at_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (s.at_us + 62135596800000000) % 1000000) AS recorded_at
FROM metric_samples s
JOIN metrics m ON m.id = s.metric_id
JOIN agents a ON a.id = s.agent_id;

CREATE VIEW v_metric_hours AS
SELECT m.channel AS channel, m.name AS name, m.kind AS kind, strftime('%Y-%m-%dT%H:%M:%S', (h.hour_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (h.hour_us + 62135596800000000) % 1000000) AS hour,
       h.samples AS samples, h.total AS total, h.total / h.samples AS mean, h.least AS min, h.most AS max,
       h.last AS last
FROM metric_hours h
JOIN metrics m ON m.id = h.metric_id
UNION ALL
SELECT m.channel, m.name, m.kind, strftime('%Y-%m-%dT%H:%M:%S', (m.hour_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (m.hour_us + 62135596800000000) % 1000000), m.hour_samples, m.hour_total,
       m.hour_total / m.hour_samples, m.hour_least, m.hour_most, m.value
FROM metrics m;

CREATE VIEW v_metric_series AS
SELECT m.channel AS channel, m.name AS name, m.kind AS kind,
       CASE m.kind WHEN 'counter' THEN m.total ELSE m.value END AS value, m.samples AS samples,
       m.total AS total, strftime('%Y-%m-%dT%H:%M:%S', (m.updated_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (m.updated_us + 62135596800000000) % 1000000) AS updated_at
FROM metrics m;

CREATE VIEW v_problems AS
SELECT 'crashed_run' AS kind, 'run ' || r.id AS subject,
       'pid ' || r.pid || ' on ' || r.host || ' ended without a clean stop' AS detail,
       strftime('%Y-%m-%dT%H:%M:%S', (r.ended_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (r.ended_us + 62135596800000000) % 1000000) AS since
FROM runs r
WHERE r.status = 'crashed' AND r.ended_us > (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) - 86400000000
UNION ALL
SELECT 'quarantined_agent', a.name,
       CASE WHEN a.failures > 0 THEN a.failures || ' errors in a row; last: '
            WHEN a.deaths > 0 THEN a.deaths || ' deaths of the process in a row; last: '
            ELSE '' END || coalesce(a.last_error, ''),
       strftime('%Y-%m-%dT%H:%M:%S', (a.quarantined_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (a.quarantined_us + 62135596800000000) % 1000000)
FROM agents a WHERE a.quarantined_us IS NOT NULL
UNION ALL
SELECT 'failing_agent', a.name, a.failures || ' errors in a row; last: ' || coalesce(a.last_error, ''),
       strftime('%Y-%m-%dT%H:%M:%S', (a.last_error_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (a.last_error_us + 62135596800000000) % 1000000)
FROM agents a WHERE a.quarantined_us IS NULL AND a.retry_us IS NOT NULL AND a.registered = 1
UNION ALL
SELECT 'dead_letters', s.subscriber, count(*) || ' deliveries were given up; last: ' || max(d.error),
       strftime('%Y-%m-%dT%H:%M:%S', (min(d.failed_us) + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (min(d.failed_us) + 62135596800000000) % 1000000)
FROM dead_letters d JOIN subscriptions s ON s.id = d.subscription_id
WHERE d.redelivered_us IS NULL AND s.ended_us IS NULL
GROUP BY s.subscriber
UNION ALL
SELECT 'lagging_subscriber', p.subscriber, p.waiting || ' events wait',
       strftime('%Y-%m-%dT%H:%M:%S', (coalesce(e.timestamp_us, t.started_us) + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (coalesce(e.timestamp_us, t.started_us) + 62135596800000000) % 1000000)
FROM (SELECT subscriber, count(*) AS waiting, min(event_id) AS first FROM v_pending GROUP BY subscriber) p
JOIN events e ON e.id = p.first
LEFT JOIN ticks t ON t.id = e.tick_id
WHERE coalesce(e.timestamp_us, t.started_us) < (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) - 300000000
UNION ALL
SELECT 'expired_subscriber', s.subscriber,
       s.skipped || ' events were skipped because it was away too long', strftime('%Y-%m-%dT%H:%M:%S', (s.seen_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (s.seen_us + 62135596800000000) % 1000000)
FROM subscriptions s WHERE s.skipped > 0 AND s.ended_us IS NULL
UNION ALL
SELECT 'overrun', 'loop', o.lost || ' slots of the clock were lost in the last hour', strftime('%Y-%m-%dT%H:%M:%S', (o.first + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (o.first + 62135596800000000) % 1000000)
FROM (SELECT sum(i.missed) AS lost, min(i.started_us) AS first FROM iterations i
      WHERE i.missed > 0 AND i.id > (SELECT max(id) FROM iterations) - 36000
        AND i.started_us > (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) - 3600000000) o
WHERE o.lost > 0
UNION ALL
SELECT 'paused_loop', 'loop', trim(p.value, '"'), strftime('%Y-%m-%dT%H:%M:%S', (CAST(s.value AS INTEGER) + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (CAST(s.value AS INTEGER) + 62135596800000000) % 1000000)
FROM positions p LEFT JOIN positions s ON s.name = 'paused_since'
WHERE p.name = 'paused_because' AND p.value <> 'null'
UNION ALL
SELECT 'limit_reached', l.name,
       count(q.id) || CASE WHEN count(q.id) = 1 THEN ' task waits: ' ELSE ' tasks wait: ' END
       || CASE WHEN l.held_until_us > (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) THEN l.held_because ELSE l.blocked_because END,
       strftime('%Y-%m-%dT%H:%M:%S', (l.blocked_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (l.blocked_us + 62135596800000000) % 1000000)
FROM limits l
LEFT JOIN tasks q ON q.applied_us IS NULL AND q.status = 'waiting' AND q.limit_name = l.name
WHERE l.blocked_us IS NOT NULL
GROUP BY l.name
UNION ALL
SELECT 'unknown_limit', l.name, 'tasks name this limit and no setting says what it allows: nothing bounds them',
       NULL
FROM limits l
WHERE l.configured = 'null' AND l.raised = '{}'
  AND EXISTS (SELECT 1 FROM tasks q WHERE q.applied_us IS NULL AND q.limit_name = l.name)
UNION ALL
SELECT 'held_tasks', q.held, count(*) || CASE WHEN count(*) = 1 THEN ' task is held; ' ELSE ' tasks are held; '
       END || 'the first is ' || min(q.id), strftime('%Y-%m-%dT%H:%M:%S', (min(q.created_us) + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (min(q.created_us) + 62135596800000000) % 1000000)
FROM tasks q WHERE q.applied_us IS NULL AND q.status = 'held'
GROUP BY q.held
UNION ALL
SELECT 'question', 'task ' || q.id, q.question, strftime('%Y-%m-%dT%H:%M:%S', (q.created_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (q.created_us + 62135596800000000) % 1000000)
FROM tasks q WHERE q.applied_us IS NULL AND q.kind = 'question' AND q.status = 'waiting'
UNION ALL
SELECT 'unapplied_result', 'task ' || q.id, a.name || ' could not take it up: ' || q.apply_error,
       strftime('%Y-%m-%dT%H:%M:%S', (q.ended_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (q.ended_us + 62135596800000000) % 1000000)
FROM tasks q JOIN agents a ON a.id = q.agent_id
WHERE q.applied_us IS NULL AND q.apply_error IS NOT NULL AND q.held IS NOT NULL
UNION ALL
SELECT 'failed_tasks', q.name, count(*) || ' failed in the last 24 hours; the last is ' || max(q.id) || ': '
       || coalesce(max(q.error), ''), strftime('%Y-%m-%dT%H:%M:%S', (min(q.ended_us) + 62135596800000000) / 1000000 - 62135596800, 'unixepoch') || printf('.%06dZ', (min(q.ended_us) + 62135596800000000) % 1000000)
FROM tasks q
WHERE q.status = 'failed' AND q.id > (SELECT max(id) FROM tasks) - 10000 AND q.ended_us > (CAST(strftime('%s', 'now') AS INTEGER) * 1000000) - 86400000000
GROUP BY q.name;
