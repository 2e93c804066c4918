-- Answers one request of a process in one step: turns.py, rows.py, limits.py and bounds.py, for Redis.
--
-- Functions have the names they have there, and the comments there hold here. All reads come first: `write`
-- only collects, and `save`, at the end, is the one place that writes. So an error changes nothing. Numbers
-- are whole and below 2^53, which Lua holds exactly; `whole` writes all their digits. None is false here.
--
-- KEYS  1 account  hash: its fields, and the server's `run` and `replid` when it was stored
--       2 bucket   hash: number -> its fields, and KEPT  3 session  hash: id -> its fields
--       4 heard    sorted set: session id by last request
--       5 line     hash: `layout:bucket:session` -> until, more, waiters     (numbers in names: 16 digits)
--       6 live     sorted set, all scores 0: `layout:bucket:until:session`
--       7 of       sorted set, all scores 0: `session layout:bucket:`
--       8 recent   sorted set: serial by when it was granted     9 probe    never stored: to try commands on
-- ARGV  1 the request as JSON     2, 3 the time by both clocks, if it is not this server's (for tests)

local ACCOUNT, BUCKET, SESSION, HEARD, LINE, LIVE, OF, RECENT, PROBE = unpack(KEYS)
local KEPT = 'kept' -- a field of the hash of buckets that is always there: without it, they were lost alone
local S, NEVER, FOREVER, MAX_COUNTER, MAX_PERIODS_BACK = 1e6, -2 ^ 62, 2 ^ 60, 2 ^ 52, 100
local SENT, UNUSED, UPDATE, FORGET = 0, 1, 1, 3
local WINDOW, BUDGET, RESET = 0, 1, 2
local OK, INTRODUCE, REFUSED = 0, 1, 2
local NUMBER, SHARD_ID, ARRIVED, POSITION, ONCE = 1, 2, 3, 4, 5 -- of a waiter
local DAY, MAX_BUCKETS = 86400 * S, 100000
local MAX_RESET_AFTER, MAX_REREAD = 2 * DAY, 366 * DAY
local SILENT, MAX_REMOVED, PATIENCE, READ_AGAIN = 60 * S, 4, 5 * S, S / 2
local UNSEEN, SAME_RESET, CONFIRM = 60 * S, 300 * S, 60 * S
local LONGEST = { -- from now, if the clock was set back
  interval_until_us = 130 * S, margin_until_us = 130 * S, differs_until_us = 60 * S, opened_us = 2 * S,
  settle_until_us = 2 * S, reader_until_us = 10 * S, read_us = 0,
}
local LIMIT = {'kind', 'total', 'remaining', 'reset_us', 'max_concurrency', 'asked_us', 'at_us'}
local SESSIONS = {'number', 'last_request_us', 'layout', 'reply'}
local BUCKETS = {
  'last_us', 'serial', 'previous_us', 'previous_serial', 'closed_until_us', 'rejections', 'rejected_serial',
  'opened_us', 'waiting',
}
local max, min, floor, ceil, sub = math.max, math.min, math.floor, math.ceil, string.sub

local function whole(number) return string.format('%.0f', number) end
local function padded(number) return string.format('%016.0f', number) end

local function precedes(one, other) -- by bytes, in every locale of the server
  local at = 1
  while at <= #one and string.byte(one, at) == string.byte(other, at) do at = at + 1 end
  return (string.byte(one, at) or -1) < (string.byte(other, at) or -1)
end

local function to_wire(value)
  if type(value) == 'number' then return whole(value) end
  if type(value) == 'string' then return cjson.encode(value) end
  local written = {}
  for at, one in ipairs(value or {}) do written[at] = to_wire(one) end
  return '[' .. table.concat(written, ',') .. ']'
end

local function named(names, list) -- a value from the list of its fields
  local value = list and #list > 0 and {}
  for at, name in ipairs(value and names or {}) do value[name] = list[at] end
  return value
end

local function get(key, field, names)
  local text = redis.call('HGET', key, field)
  return text and named(names, cjson.decode(text))
end

local function info(section, pattern) -- empty, if this user may not ask
  local text = redis.pcall('INFO', section)
  return type(text) == 'string' and string.match(text, pattern) or ''
end

local request = named({
  'attempt', 'sent_us', 'session', 'number', 'interval_us', 'margin_us', 'period_us', 'lease_us', 'reserve',
  'reread_us', 'can_read', 'look', 'layout', 'lines', 'reports', 'limit', 'introduction',
}, cjson.decode(ARGV[1]))
local new = named(
  {'replaces', 'bot', 'limit', 'granted', 'period', 'layout', 'seen'}, request.introduction)
local limit = named(LIMIT, request.limit)
if new then new.limit, new.seen = named(LIMIT, new.limit), named(LIMIT, new.seen) end
local time = redis.call('TIME')
local now = tonumber(ARGV[2]) or time[1] * S + time[2]
local wall, shift_us = tonumber(ARGV[3]) or now, now - request.sent_us
local notice_us = min(floor(request.lease_us / 3), 2 * S)
local reread_us = request.reread_us ~= 0 and request.reread_us or FOREVER
local account = {
  granted = 0, period = 0, layout = 0, window_us = 1, period_us = 0, max_concurrency = 1,
  total = false, remaining = 0, used = 0, resets_at_us = false, max_reset_us = 0, refresh_owed = 0,
  other_reset_us = false, other_read_us = false, last_us = now, closed_until_us = NEVER, rejections = 0,
  interval_us = 0, margin_us = 0, interval_until_us = NEVER, margin_until_us = NEVER, opened_us = NEVER,
  differs_until_us = NEVER, settle_until_us = NEVER, reader_until_us = NEVER, read_us = NEVER,
  read_due_us = NEVER, reserve = 0, bot = '', reader = '', run = '', replid = '',
}
local buckets, divided, saves = {}, false, false
local lost, limit_result, uncounted, reset_denied = 0, 0, -1, false
local rejections, permits, waits = {}, {}, {}
local recent = nil -- permits, when they were loaded
local writes, rows, stored_until = {}, {}, {} -- rows: lines as they are now, by name
local removed, forgotten = {}, {} -- sessions and recent permits to be deleted

-- the store and rows.py -----------------------------------------------------------------------------

local function write(...) writes[#writes + 1] = {...} end

local function bound_times(row)
  for name, us in pairs(LONGEST) do row[name] = row[name] and min(row[name], now + us) end
  return row
end

local function get_bucket(number)
  buckets[number] = buckets[number] or
    bound_times(not divided and get(BUCKET, whole(number), BUCKETS) or named(BUCKETS, {
      account.last_us, 0, NEVER, 0, account.closed_until_us, account.rejections, 0, NEVER, 0,
    }))
  return buckets[number]
end

local function goes_on(bucket) -- whether its row of rejections does
  return bucket.rejected_serial == bucket.serial or bucket.rejected_serial == bucket.previous_serial
end

local function load_all()
  for _, number in ipairs(divided and {} or redis.call('HKEYS', BUCKET)) do
    if number ~= KEPT then get_bucket(tonumber(number)) end
  end
end

local function load_lines(names) -- into `rows`; what is there already stays
  local missing = {}
  for _, name in ipairs(names) do missing[#missing + 1] = rows[name] == nil and name or nil end
  for first = 1, #missing, 4000 do -- unpack has its limits
    local some = {unpack(missing, first, min(first + 3999, #missing))}
    for at, text in ipairs(redis.call('HMGET', LINE, unpack(some))) do
      local row = text and named({'until_us', 'more', 'waiters', 'name'}, cjson.decode(text))
      if row then row.name = some[at] end
      rows[some[at]], stored_until[some[at]] = row, row and row.until_us
    end
  end
  return names
end

local function others_in(number, since_us) -- lines of other sessions, live at some time since then
  local place, found = padded(account.layout) .. ':' .. padded(number) .. ':', {}
  local least, below = place .. padded(since_us + 1), place .. padded(now + 60 * S + 1)
  local names = redis.call('ZRANGEBYLEX', LIVE, '[' .. least, '(' .. below)
  for at, member in ipairs(names) do names[at] = sub(member, 1, 34) .. sub(member, 52) end
  for _, name in ipairs(load_lines(names)) do
    local row = sub(name, 35) ~= request.session and rows[name]
    found[#found + 1] = row and row.until_us > since_us and row or nil
  end
  return found
end

local function count_in(row) return row and #row.waiters + row.more or 0 end

local function add_waiting(name, count)
  if sub(name, 1, 16) ~= padded(account.layout) then return end
  local bucket = get_bucket(tonumber(sub(name, 18, 33)))
  bucket.waiting = bucket.waiting + count
end

local function lines_of(session) -- their names
  local names = {}
  for _, member in ipairs(redis.call('ZRANGEBYLEX', OF, '[' .. session .. ' ', '(' .. session .. '!')) do
    names[#names + 1] = #member == #session + 35 and sub(member, -34) .. session or nil
  end
  return load_lines(names)
end

local function drop_lines(session)
  for _, name in ipairs(lines_of(session)) do
    if rows[name] then add_waiting(name, -count_in(rows[name])) end
    rows[name] = false
  end
end

local function remove(session)
  drop_lines(session)
  removed[session] = true
  write('HDEL', SESSION, session)
  write('ZREM', HEARD, session)
end

local function put_session(id, number, at_us, layout, text)
  write('HSET', SESSION, id, sub(to_wire({number, at_us, layout}), 1, -2) .. ',' .. text .. ']')
  write('ZADD', HEARD, whole(at_us), id)
end

local function forget(serial)
  forgotten[serial] = true
  if recent then recent[serial] = nil end
  write('ZREM', RECENT, serial)
end

local function max_closure(row) return max(row >= 10 and 900 * S or 60 * S, 2 * account.window_us) end

local function closed_until(bucket)
  local rejected_us = min(bucket.closed_until_us, now + max_closure(bucket.rejections))
  return max(min(bucket.last_us, now) + account.window_us, rejected_us)
end

local function due_us(bucket) return max(closed_until(bucket), account.settle_until_us) end

local function divide(max_concurrency) -- and load_for_division, and rebucket: the account is its default bucket
  local waiting = 0 -- in other sessions
  load_all()
  for _, name in ipairs(lines_of(request.session)) do
    waiting = waiting - (sub(name, 1, 16) == padded(account.layout) and count_in(rows[name]) or 0)
  end
  for _, bucket in pairs(buckets) do
    waiting = waiting + bucket.waiting
    account.last_us = max(account.last_us, bucket.last_us)
    account.closed_until_us = max(account.closed_until_us, bucket.closed_until_us)
    account.rejections = max(account.rejections, goes_on(bucket) and bucket.rejections or 0)
  end
  if waiting > 0 and not new and max_concurrency ~= account.max_concurrency then
    account.settle_until_us = now + notice_us
  end
  buckets, divided, account.max_concurrency = {}, true, max_concurrency
  account.layout = account.layout + 1
  write('UNLINK', BUCKET)
end

local function lose(period) -- close all buckets for one window
  divide(account.max_concurrency)
  account.last_us, saves = now, true
  lost, account.period = 1, max(max(account.period, period) + MAX_PERIODS_BACK, wall)
end

-- limits.py, and the other limits.py ----------------------------------------------------------------

local function budget() -- total, remaining, resets in
  if not account.total then return -1, -1, 0 end
  local in_us = account.resets_at_us and min(max(account.resets_at_us - wall, 0), account.max_reset_us) or 0
  return account.total, account.resets_at_us and in_us == 0 and account.total or account.remaining, in_us
end

local function as_now(given)
  given.reset_us = min(max(0, given.reset_us - (request.sent_us - given.at_us)), given.reset_us)
  return given
end

local function adopt(given)
  local untouched = given.remaining == given.total and given.reset_us == 0
  account.resets_at_us, account.max_reset_us = not untouched and wall + given.reset_us, given.reset_us
  account.total, account.remaining, account.max_concurrency = given.total, given.remaining, given.max_concurrency
  account.period, account.used, account.refresh_owed = account.period + 1, 0, 0
  account.other_reset_us, account.other_read_us = false, false
end

local function begin_period(given, used, recent)
  local theirs, resets = given.remaining, given.reset_us > 0
  local left, stale = max(0, min(given.total - used, theirs - recent)), not resets and theirs < given.total
  if resets or stale then given.remaining = stale and 0 or left end
  if given.remaining < given.total then given.reset_us = max(given.reset_us, S) end
  adopt(given)
  if stale then return false end
  account.remaining, account.used = left, used
  return left == theirs or resets
end

local function read(given, recent)
  local known, resets_at_us, other = account.resets_at_us, wall + given.reset_us, account.other_reset_us
  if known and wall >= known then return begin_period(given, 0, recent) end
  if account.refresh_owed == 1 and not (account.used > 0 and given.reset_us == 0) then
    return begin_period(given, account.used, recent)
  end
  local same, left = known and math.abs(resets_at_us - known) <= SAME_RESET, given.remaining - recent
  if same then
    account.other_reset_us, account.other_read_us, account.total = false, false, given.total
    account.max_reset_us = resets_at_us > known and max(account.max_reset_us, given.reset_us) or account.max_reset_us
    account.resets_at_us = max(known, resets_at_us)
  else
    if known and not (other and math.abs(resets_at_us - other) <= SAME_RESET) then
      account.other_reset_us, account.other_read_us = resets_at_us, wall
    end
    if not known or wall - account.other_read_us >= CONFIRM then return begin_period(given, recent, recent) end
    account.total, left = min(given.total, account.total), min(left, account.remaining)
  end
  account.remaining = max(0, min(account.total - account.used, left))
  return same and (recent == 0 or account.total - account.used <= left)
end

local function load_recent() -- once; when permits were granted, by serial
  if recent then return recent end
  local found = redis.call('ZRANGE', RECENT, 0, -1, 'WITHSCORES')
  recent = {}
  for at = 1, #found, 2 do
    local serial, at_us = found[at], tonumber(found[at + 1])
    if not forgotten[serial] then
      recent[serial] = min(at_us, wall)
      if at_us > wall then write('ZADD', RECENT, whole(wall), serial) end
    end
  end
  return recent
end

local function unseen_us() return min(UNSEEN, floor(account.period_us / 100)) end

local function count_recent(since_us)
  local count = 0
  for _, at_us in pairs(load_recent()) do count = count + (at_us >= since_us and 1 or 0) end
  return count
end

local function forget_old()
  local old = redis.call('ZRANGEBYSCORE', RECENT, '-inf', '(' .. whole(wall - 2 * UNSEEN))
  for _, serial in ipairs(old) do forget(serial) end
end

local function adopt_default()
  adopt({total = 1000, remaining = 1000, reset_us = 0, max_concurrency = account.max_concurrency})
end

local function forget_limit()
  adopt_default()
  account.bot, limit_result = '', 1
  if account.read_us <= NEVER then return end
  account.total, account.remaining, account.refresh_owed, account.resets_at_us = false, 0, 1, wall + SILENT
end

local function change()
  if limit.kind == FORGET then return forget_limit() end
  local theirs, reset_us, reads = limit.remaining, limit.reset_us, limit.kind ~= UPDATE
  local divides = limit.max_concurrency ~= account.max_concurrency
  as_now(limit)
  if reads and account.reader == request.session then account.reader = '' end
  local is_late = account.total and request.sent_us - limit.asked_us > UNSEEN
  limit_result = reads and (is_late or reset_us > 0 and limit.reset_us == 0) and 2 or 1
  if limit_result == 2 then return end
  if divides then divide(limit.max_concurrency) end
  if not reads then return adopt(limit) end
  local since_us = wall - (request.sent_us - limit.asked_us) - unseen_us()
  local recent = count_recent(since_us)
  for serial, at_us in pairs(load_recent()) do
    if at_us < since_us then forget(serial) end
  end
  if request.can_read ~= 0 or account.read_us > NEVER then account.read_us = now end
  account.read_due_us = now + (read(limit, recent) and reread_us or CONFIRM)
  if theirs - recent > account.remaining then uncounted = theirs - recent end
end

local function open_with(given)
  local _, remaining, in_us = budget()
  local runs, period, owed, used = in_us > 0, account.period, account.refresh_owed, account.used
  if given.max_concurrency ~= account.max_concurrency then divide(given.max_concurrency) end
  as_now(given)
  if runs then
    given.reset_us = given.remaining < remaining and max(given.reset_us, in_us) or in_us
    given.remaining = min(given.remaining, remaining)
  end
  adopt(given)
  if runs then account.period, account.refresh_owed, account.used = period, owed, used end
end

local function create()
  local given = new.limit or new.seen
  write('UNLINK', BUCKET, SESSION, HEARD, LINE, LIVE, OF, RECENT) -- of an account that was deleted alone
  account.granted, account.layout, divided = new.granted, new.layout + 1, true
  account.period, lost = max(new.period + MAX_PERIODS_BACK, wall), 1
  if given then adopt(as_now(given)) elseif request.can_read == 0 then adopt_default() end
  account.refresh_owed = new.limit and 0 or 1
  if new.limit and request.can_read ~= 0 then
    account.read_us, account.read_due_us = now, now + reread_us
  end
end

-- bounds.py -----------------------------------------------------------------------------------------

local function refusal()
  local why, digits, unit, by, different, count = '', '%g', ' s', S, {}, 0
  local function check(name, value, least, most)
    if why == '' and (value < least or value > most) then
      local text = '%s must be ' .. digits .. ' to ' .. digits .. unit .. ', not ' .. digits .. unit
      why = string.format(text, name, least / by, most / by, value / by)
    end
  end
  local limits = {limit or nil}
  for _, name in ipairs(new and {'limit', 'seen'} or {}) do limits[#limits + 1] = new[name] or nil end
  check('interval', request.interval_us, 1, 60 * S)
  check('margin', request.margin_us, 0, 10 * S)
  check('lease', request.lease_us, S / 10, 60 * S)
  check('period', request.period_us, 1, MAX_RESET_AFTER)
  check('reread_after', request.reread_us, 0, MAX_REREAD)
  for _, line in ipairs(request.lines) do
    for _, waiter in ipairs(line[3]) do
      check('age', request.sent_us - waiter[ARRIVED], -DAY, 7 * DAY)
      check('head start', waiter[ARRIVED] - waiter[POSITION], -DAY, DAY)
    end
    count, different[line[1]] = count + (different[line[1]] and 0 or 1), true
  end
  for _, one in ipairs(limits) do check('reset_after', one.reset_us, 0, MAX_RESET_AFTER) end
  digits, unit, by = '%.0f', '', 1
  check('reserve', request.reserve, 0, MAX_COUNTER)
  check('changes', #request.lines + #request.reports, 0, 1000)
  check('number', request.number, 1, new and 1 or MAX_COUNTER)
  check('buckets', count, #request.lines, 1000)
  for _, line in ipairs(request.lines) do
    check('bucket', line[1], 0, MAX_BUCKETS)
    check('waiting', line[2], 0, 2 ^ 32)
    check('waiters', #line[3], 0, 2)
    for _, waiter in ipairs(line[3]) do check('shard_id', waiter[SHARD_ID], 0, MAX_COUNTER) end
  end
  for _, report in ipairs(request.reports) do
    check('kind of report', report[1], 0, 2)
    check('serial', report[2], 1, 2 * MAX_COUNTER - 1)
    check('shard_id', report[3], 0, MAX_COUNTER)
  end
  for _, one in ipairs(limits) do
    check('kind of limit', one.kind, 0, 3)
    check('max_concurrency', one.max_concurrency, 1, MAX_BUCKETS)
    check('total', one.total, 0, MAX_COUNTER)
    check('remaining', one.remaining, 0, one.total)
  end
  for _, name in ipairs(new and {'granted', 'period', 'layout'} or {}) do check(name, new[name], 0, MAX_COUNTER) end
  local other_bot = new and new.bot ~= '' and account.bot ~= '' and new.bot ~= account.bot
  if why ~= '' or not other_bot then return why end
  return 'the account belongs to bot ' .. account.bot .. ', not ' .. new.bot ..
    ': each needs an account of its own (`limit --forget` frees this one)'
end

-- turns.py and token_bucket.py ----------------------------------------------------------------------

local function introduce(known)
  local older = known and new.granted > account.granted
  if not known then create() elseif older then lose(new.period) end
  if older then
    account.layout, account.granted = max(account.layout, new.layout + 1), new.granted
    if new.seen then open_with(new.seen) end
    account.refresh_owed = 1
  end
  if known and new.limit then open_with(new.limit) end
  if account.bot == '' then account.bot = new.bot end
  if known and redis.call('HEXISTS', SESSION, new.replaces) == 1 then remove(new.replaces) end
end

local function settings()
  local window_us, differs = account.window_us, false
  local until_us = now + request.lease_us + request.interval_us + request.margin_us
  for name, until_name in pairs({interval_us = 'interval_until_us', margin_us = 'margin_until_us'}) do
    if request[name] >= account[name] or now >= account[until_name] then
      account[name], account[until_name] = request[name], until_us
    end
    differs = differs or account[name] ~= request[name]
  end
  if differs then account.differs_until_us = now + 60 * S end
  account.window_us, account.period_us = account.interval_us + account.margin_us, request.period_us
  if account.window_us < window_us then account.opened_us = now + notice_us end
end

local function report(kind, serial, shard_id, period, at_us)
  local bucket = get_bucket(math.fmod(shard_id, account.max_concurrency))
  local due, last = due_us(bucket), bucket.rejected_serial
  at_us = min(now, at_us + shift_us)
  local back = account.period - period
  local since_lost = back >= 0 and back < MAX_PERIODS_BACK
  if kind == SENT then
    bucket.last_us = max(bucket.last_us, at_us)
    if bucket.serial ~= serial then bucket.previous_us = bucket.last_us end
  elseif kind == UNUSED and since_lost then
    local is_recent = not forgotten[padded(serial)] and redis.call('ZSCORE', RECENT, padded(serial))
    if bucket.serial == serial then bucket.last_us, bucket.serial = bucket.previous_us, bucket.previous_serial end
    if account.total and account.period == period then
      account.remaining = (is_recent or account.read_us == NEVER) and min(account.remaining + 1, account.total) or account.remaining
      account.used = max(0, account.used - 1)
    end
    forget(padded(serial))
  elseif kind > UNUSED and serial > last then
    bucket.rejections, bucket.rejected_serial = goes_on(bucket) and min(bucket.rejections + 1, 32) or 1, serial
    local closed_us = min(account.window_us * 2 ^ bucket.rejections, max_closure(bucket.rejections))
    bucket.closed_until_us = max(bucket.closed_until_us, at_us + closed_us)
    rejections[#rejections + 1] = {serial, bucket.rejections}
  end
  if now < due and due > due_us(bucket) then bucket.opened_us = min(due, now + notice_us) end
end

local function left_now() -- -1 while heads wait for the limit
  local _, left = budget()
  return account.resets_at_us and wall >= account.resets_at_us and -1 or left
end

local function reports()
  local before = left_now()
  for _, one in ipairs(request.reports) do report(unpack(one)) end
  if limit then change() end
  if before <= request.reserve and request.reserve < left_now() then account.opened_us = now + notice_us end
end

local function next_period(remaining, used) -- one that begins without a read
  account.period, account.remaining, account.used = account.period + 1, remaining, used
  account.other_reset_us, account.other_read_us, account.refresh_owed = false, false, 1
end

local function take(bucket, not_before_us, can_refresh) -- what is left; or nil, a reason and a wait
  local due, wait_us = account.resets_at_us and wall >= account.resets_at_us, 0
  local early = due and account.read_us > NEVER and count_recent(account.resets_at_us - unseen_us() + 1) or 0
  local left = (due and account.total - early or account.remaining) - 1
  if bucket.last_us + account.window_us > now or bucket.closed_until_us > now or not_before_us > now then
    wait_us = max(closed_until(bucket), not_before_us) - now
    bucket.last_us = min(bucket.last_us, now)
    bucket.closed_until_us = min(bucket.closed_until_us, now + max_closure(bucket.rejections))
  end
  if left < request.reserve then
    local _, _, in_us = budget()
    if in_us == 0 then
      in_us, account.max_reset_us = account.period_us, account.period_us
      if early > 0 then next_period(max(0, account.total - early), early) end
    end
    account.resets_at_us = wall + in_us
    return nil, BUDGET, max(wait_us, in_us)
  end
  if wait_us > 0 then return nil, WINDOW, wait_us end
  if can_refresh and (due or account.refresh_owed == 1) then return nil, RESET end
  if due then next_period(left, early) end
  account.used = account.used + 1
  if due or not account.resets_at_us then
    account.resets_at_us, account.max_reset_us = wall + account.period_us, account.period_us
  end
  account.remaining, account.granted = left, account.granted + 1
  bucket.previous_us, bucket.previous_serial = bucket.last_us, bucket.serial
  bucket.last_us, bucket.serial = now, account.granted
  return left
end

local function ask(number, head, others) -- a permit, or a wait
  if not account.total and account.resets_at_us and wall >= account.resets_at_us and request.can_read == 0 then
    adopt_default() -- nobody has read a limit that was forgotten
    account.opened_us = now + notice_us
  end
  local bucket, resets_at_us, ahead = get_bucket(number), account.resets_at_us, {}
  for _, row in ipairs(others) do
    local later_us = row.waiters[1][POSITION] - head[POSITION]
    local before = later_us < 0 or later_us == 0 and precedes(sub(row.name, 35), request.session)
    ahead[#ahead + 1] = row.until_us > now and before and row or nil
  end
  local since_us = resets_at_us and wall - resets_at_us or -1
  local reads = request.can_read ~= 0 or account.read_us > NEVER -- or some process can
  local reset_us = since_us >= 0 and now - since_us + (since_us >= PATIENCE and reads and PATIENCE or 0) or NEVER
  local late_us, due = #ahead * min(S / 10, floor(account.window_us / 5)), due_us(bucket)
  local turn_us, left, reason, wait_us = due, nil, RESET, READ_AGAIN
  if #ahead > 0 then
    turn_us = max(due, account.opened_us, bucket.opened_us, reset_us)
    turn_us = max(turn_us + late_us, now + head[ONCE])
  end
  if account.total then
    account.reserve = request.reserve
    left, reason, wait_us = take(bucket, turn_us, reads and since_us >= 0 and since_us < PATIENCE)
    if reason == BUDGET then wait_us = wait_us + late_us end
    if reason == RESET then wait_us = min(READ_AGAIN, PATIENCE - since_us) + late_us end
    if reason == WINDOW then
      wait_us = due + late_us > now and due + late_us - now or min(wait_us, account.window_us)
    end
  end
  if not left then
    reset_denied = reset_denied or reason == RESET
    wait_us = max(1, ceil(wait_us / max(1, ceil(wait_us / notice_us))))
    return nil, {number, wait_us, max(0, due_us(bucket) - now), reason, 0}
  end
  if resets_at_us and account.resets_at_us ~= resets_at_us then
    account.opened_us = max(account.opened_us, reset_us)
  end
  for _, row in ipairs(ahead) do row.until_us = now end
  write('ZADD', RECENT, whole(wall), padded(account.granted))
  if recent then recent[padded(account.granted)] = wall end
  return {head[NUMBER], account.granted, number, head[SHARD_ID], account.period, left, 0}
end

local function replace_line(number, more, waiters)
  for _, waiter in ipairs(waiters) do
    if math.fmod(waiter[SHARD_ID], account.max_concurrency) ~= number then return end
  end
  local place = padded(account.layout) .. ':' .. padded(number) .. ':'
  local name, known, wait = place .. request.session, {}, nil
  local old = rows[load_lines({name})[1]]
  for _, waiter in ipairs(old and old.waiters or {}) do known[waiter[NUMBER]] = waiter end
  for _, waiter in ipairs(waiters) do
    for _, at in ipairs({ARRIVED, POSITION}) do
      local us, before = waiter[at] + shift_us, known[waiter[NUMBER]]
      waiter[at] = before and min(us, before[at]) or us
    end
  end
  local others = #waiters > 0 and others_in(number, now) or {}
  while #waiters > 0 do
    permits[#permits + 1], wait = ask(number, waiters[1], others)
    if wait and waiters[1][ONCE] == 0 then break end
    table.remove(waiters, 1)
  end
  rows[name] = #waiters > 0 and {
    until_us = now + request.lease_us, more = more, waiters = waiters, name = name, put = true,
  }
  add_waiting(name, count_in(rows[name]) - count_in(old))
  if wait then wait[5] = get_bucket(number).waiting end
  waits[#waits + 1] = wait
end

local function reads(uses)
  local own, claimed = account.reader == request.session, account.reader ~= '' and now < account.reader_until_us
  local due = not account.total or account.refresh_owed == 1 or reset_denied
    or uses and now >= account.read_due_us or new and now >= account.read_us + 60 * S
  if request.can_read == 0 and own then account.reader = '' end
  if request.can_read == 0 or not due or claimed and not own then return 0 end
  if not claimed then account.reader, account.reader_until_us = request.session, now + 10 * S end
  return 1
end

local function look()
  local ready, lines, default_us = {}, {}, closed_until(account)
  load_all()
  for number in pairs(buckets) do ready[#ready + 1] = number end
  table.sort(ready)
  for at, number in ipairs(ready) do
    ready[at] = {number, max(0, due_us(buckets[number]) - now)}
    local others = others_in(number, now - notice_us) -- who was passed over has not asked again yet
    table.sort(others, function(one, other) return precedes(one.name, other.name) end)
    for _, row in ipairs(others) do lines[#lines + 1] = {number, row.more, row.waiters} end
  end
  local others_us = max(0, default_us - now, account.settle_until_us - now)
  return {ready, others_us, lines, account.reserve, account.period_us}
end

local function reply(status, why, read)
  local total, remaining, resets_in_us = budget()
  return {
    request.attempt, request.number, status, why, lost, now, account.granted, account.period, account.layout,
    total, max(0, remaining), resets_in_us, account.max_concurrency, account.interval_us, account.margin_us,
    now < account.differs_until_us and 1 or 0, read or 0, limit_result, uncounted, rejections,
    permits, waits, {},
  }
end

local function with_look(text) -- a reply as JSON, with who waits if that was asked
  return request.look ~= 0 and sub(text, 1, -4) .. to_wire(look()) .. ']' or text
end

local function replay(given)
  local since_us = now >= given[6] and now - given[6] or 3600 * S
  given[1], given[6] = request.attempt, now
  for _, permit in ipairs(given[21]) do permit[7] = permit[7] + since_us end
  for _, wait in ipairs(given[22]) do wait[2] = max(0, wait[2] - since_us) end
  return given
end

local function remove_silent()
  local count, ranges = 0, {{'-inf', '(' .. whole(now - SILENT)}, {'(' .. whole(now + SILENT), '+inf'}}
  for at, range in ipairs(ranges) do
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', HEARD, range[1], range[2], 'LIMIT', 0, MAX_REMOVED + 2)) do
      if count < MAX_REMOVED and id ~= request.session and not removed[id] then
        local row = at == 2 and get(SESSION, id, SESSIONS)
        if row then put_session(id, row.number, now, row.layout, to_wire(row.reply)) else remove(id) end
        count = count + 1
      end
    end
  end
end

local function apply(row, known)
  local uses = false
  saves = true
  if new then
    introduce(known)
    row = {layout = account.layout}
  elseif row.layout ~= account.layout and account.layout == request.layout then
    drop_lines(request.session)
    row.layout = request.layout
  end
  settings()
  reports()
  for _, line in ipairs(request.lines) do
    uses = uses or #line[3] > 0
    if request.layout == account.layout then replace_line(unpack(line)) end
  end
  local text = to_wire(reply(OK, '', reads(uses)))
  put_session(request.session, request.number, now, row.layout, text)
  text = with_look(text)
  remove_silent()
  if #permits > 0 then forget_old() end
  return text
end

local function answer(known)
  local why = refusal()
  if why ~= '' then return to_wire(reply(REFUSED, why)) end
  if known and request.session == '' then return with_look(to_wire(reply(OK, ''))) end
  local row = known and get(SESSION, request.session, SESSIONS)
  if row and row.number == request.number then return with_look(to_wire(replay(row.reply))) end
  if new and not row and request.session ~= '' then return apply(row, known) end
  if row and not new and request.number == row.number + 1 then return apply(row, known) end
  if row and not new and request.number > row.number then
    lose(0)
    remove(request.session)
  end
  return to_wire(reply(INTRODUCE, ''))
end

local function save()
  local fields = {}
  for name, value in pairs(account) do
    fields[#fields + 1] = name
    fields[#fields + 1] = type(value) == 'number' and whole(value) or value or ''
  end
  table.insert(writes, 1, {'HSET', ACCOUNT, unpack(fields)})
  if divided then write('HSET', BUCKET, KEPT, '') end
  for number, bucket in pairs(buckets) do
    local list = {}
    for at, name in ipairs(BUCKETS) do list[at] = bucket[name] end
    write('HSET', BUCKET, whole(number), to_wire(list))
  end
  for name, row in pairs(rows) do
    local was, place, session = stored_until[name], sub(name, 1, 34), sub(name, 35)
    if was and (not row or row.until_us ~= was) then write('ZREM', LIVE, place .. padded(was) .. ':' .. session) end
    if row and (row.put or row.until_us ~= was) then
      write('HSET', LINE, name, to_wire({row.until_us, row.more, row.waiters}))
      write('ZADD', LIVE, 0, place .. padded(row.until_us) .. ':' .. session)
      write('ZADD', OF, 0, session .. ' ' .. place)
    elseif was and not row then
      write('HDEL', LINE, name)
      write('ZREM', OF, session .. ' ' .. place)
    end
  end
  -- What this user may not do, or another program keeps under a key, shows before anything changes.
  -- ZADD first: Redis only looks whether there is memory at a script's first write, if that may need any.
  for _, key in ipairs({HEARD, LIVE, OF, RECENT}) do
    redis.call('ZADD', key, 'XX', 0, '')
    redis.call('ZREM', key, '')
  end
  for _, key in ipairs({ACCOUNT, BUCKET, SESSION, LINE}) do redis.call('HDEL', key, '') end
  redis.call('UNLINK', PROBE)
  for _, words in ipairs(writes) do redis.call(unpack(words)) end
end

local stored = redis.call('HGETALL', ACCOUNT)
for at = 1, #stored, 2 do
  local name, text = stored[at], stored[at + 1]
  account[name] = type(account[name]) == 'string' and text or tonumber(text) or false
end
bound_times(account)
if request.reread_us ~= 0 then account.read_due_us = min(account.read_due_us, now + max(reread_us, CONFIRM)) end
local ids = {run = info('server', 'run_id:(%w+)'), replid = info('replication', 'master_replid:(%w+)')}
for name, id in pairs(ids) do
  if account[name] ~= '' and id ~= '' and account[name] ~= id then lost = 1 end
  account[name] = id ~= '' and id or account[name]
end
if #stored > 0 and redis.call('HEXISTS', BUCKET, KEPT) == 0 then lost = 1 end
if lost == 1 then
  lose(0)
  account.refresh_owed = 1
end
local answered = answer(#stored > 0)
if saves then save() end
return answered
