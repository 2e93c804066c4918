-- Answers a request in one atomic step. The rules and names are those of turns.py; see the comments there.
--
-- Most requests only begin a session, report, ask for permits and replace lines: these are answered here ('apply').
-- All others are rare (a limit, a repeated request, a loss): the script returns what is stored ('read'), Python
-- computes with turns.py what is to be written, and the script writes it ('store') if nothing was written in
-- between. If something was, nobody else is answered until the process has stored its result: at most for twice as
-- long as that took, but a second at least, and 4 s at most.
--
-- All reads come first: `write` only collects, and `save`, at the end, is the one place that writes. So an error
-- changes nothing. Numbers are whole and below 2^53, so exact (but for NEVER and FOREVER). None is false.
--
-- KEYS  1 ledger   hash: 'account', and each bucket by its number, as JSON objects
--       2 recent   sorted set: serials by when they were granted
--       3 session, 4 the one that it replaces: `number last_request_us created reply`; both expire
--       5 claim    the session whose request Python computes: others wait; it expires    6 probe  to try commands
-- ARGV  1 the request as JSON    2 'apply', 'read' or 'store'
--       3, 4, 5 to store: what `changed` must still be; the commands as JSON: name, index of the key, arguments;
--       when their rows were read    6, 7 the time by both clocks, if it is not this server's (for tests)

local LEDGER, RECENT, SESSION, REPLACED, CLAIM, PROBE = unpack(KEYS)
local S, NEVER, MAX_PERIODS_BACK = 1e6, -2 ^ 62, 100
local VERSION = 6 -- of what is stored, as in store_redis.py
local UNUSED, REJECTED = 1, 2 -- kinds of report; 0: sent
local WINDOW, BUDGET, RESET = 0, 1, 2 -- why there is no permit
local NUMBER, SHARD_ID, ARRIVED, POSITION, ONCE, HOLD = 1, 2, 3, 4, 5, 6 -- of a waiter
local ID, UNTIL, HEAD, WAITING, FIRST = 1, 2, 3, 4, 5 -- of a line: strings; HEAD is the position of its head
local SILENT, PATIENCE, READ_AGAIN, UNSEEN = 60 * S, 5 * S, S / 2, 60 * S
local max, min, floor, ceil = math.max, math.min, math.floor, math.ceil

-- JSON and what is stored ---------------------------------------------------------------------------------------

-- %d is faster, but may have 32 bits.
local WHOLE = string.format('%d', 2 ^ 53) == '9007199254740992' and '%d' or '%.0f'

local function whole(number) return string.format(WHOLE, number) end

local function to_json(value) -- of a number, a string, false or a list
  if type(value) == 'number' then return whole(value) end
  if type(value) ~= 'table' then return cjson.encode(value) end
  local written = {}
  for at, one in ipairs(value) do written[at] = to_json(one) end
  return '[' .. table.concat(written, ',') .. ']'
end

local function object(value)
  local written = {}
  for name, one in pairs(value) do written[#written + 1] = '"' .. name .. '":' .. to_json(one) end
  return '{' .. table.concat(written, ',') .. '}'
end

local request, given = {}, cjson.decode(ARGV[1])
for at, name in ipairs({
  'attempt', 'sent_us', 'session', 'number', 'interval_us', 'margin_us', 'period_us', 'lease_us', 'reserve',
  'reread_us', 'can_read', 'look', 'layout', 'lines', 'reports',
}) do request[name] = given[at] end
local new = given[17] -- the introduction, {} if this is none
local REPLACES, BOT, LIMIT, GRANTED = 1, 2, 3, 4

local tag = whole(request.attempt) .. ' ' .. request.session -- of the request that this is the answer to
local time = redis.call('TIME')
local now = tonumber(ARGV[6]) or time[1] * S + time[2]
local wall, shift_us = tonumber(ARGV[7]) or now, now - request.sent_us
local notice_us = min(floor(request.lease_us / 3), 2 * S)
local stored = redis.call('HGET', LEDGER, 'account')
local account = stored and cjson.decode(stored)
if account and account.version ~= VERSION then
  return redis.error_reply('ERR it was written by another version of this package; to begin anew, delete its keys')
end
local session = redis.call('GET', SESSION)
local buckets, refunded, writes = {}, {}, {}
local rejections, permits, waits, reset_denied = {}, {}, {}, false

local function info(section, pattern) -- empty, if this user may not ask
  local text = redis.pcall('INFO', section)
  return type(text) == 'string' and string.match(text, pattern) or ''
end

local run, replid = info('server', 'run_id:(%w+)'), info('replication', 'master_replid:(%w+)')

local function write(...) writes[#writes + 1] = {...} end

local function bound_times(row, most) -- in case the server's clock was set back
  for name, us in pairs(most) do row[name] = min(row[name], now + us) end
end

local function get_bucket(number)
  if buckets[number] then return buckets[number] end
  local text, lines = redis.call('HGET', LEDGER, whole(number)), {}
  local bucket = text and cjson.decode(text) or {
    last_us = account.default_last_us, hold_us = account.default_hold_us, serial = 0,
    previous_us = NEVER, previous_serial = 0, closed_until_us = account.default_closed_until_us,
    rejections = account.default_rejections, rejected_serial = 0, opened_us = NEVER, lines = {},
  }
  bucket.opened_us = min(bucket.opened_us, now + 2 * S)
  for _, row in ipairs(bucket.lines) do
    local line = {string.match(row, '^(%S+) (%S+) (%S+) (%S+) (.*)')}
    local left_us = line[UNTIL] - now
    if -notice_us < left_us and left_us <= 60 * S then lines[#lines + 1] = line end
  end
  bucket.lines, buckets[number] = lines, bucket
  return bucket
end

local function save()
  -- First run each command without effect: if the user may not, or a key has another type, this fails here.
  -- ZADD first: Redis checks its memory limit only at the first write of a script, if that one can use memory.
  redis.call('ZADD', RECENT, 'XX', 0, '')
  redis.call('ZREM', RECENT, '')
  redis.call('ZREMRANGEBYSCORE', RECENT, 1, 0)
  redis.call('SET', PROBE, '', 'XX')
  redis.call('UNLINK', PROBE)
  redis.call('HSET', PROBE, '', '')
  redis.call('UNLINK', PROBE)
  for _, words in ipairs(writes) do redis.call(unpack(words)) end
end

-- token_bucket.py and limits.py ---------------------------------------------------------------------------------

local function max_closure(rejected) return max(rejected >= 10 and 900 * S or 60 * S, 2 * account.window_us) end

local function closed_until(bucket)
  local rejected_us = min(bucket.closed_until_us, now + max_closure(bucket.rejections))
  return max(min(bucket.last_us, now) + bucket.hold_us + account.window_us, rejected_us)
end

local function due_us(bucket) return max(closed_until(bucket), account.settle_until_us) end

local function has_reader() return account.read_us > NEVER end -- a process that can read the limit

local function is_reset_due() return account.resets_at_us and wall >= account.resets_at_us end

local function resets_in() return min(max(account.resets_at_us - wall, 0), account.max_reset_us) end

local function early() -- permits that may count in the period that begins now
  if not has_reader() then return 0 end
  local since_us = account.resets_at_us - min(UNSEEN, floor(account.period_us / 100)) + 1
  local count = redis.call('ZCOUNT', RECENT, whole(since_us), '+inf')
  for _, at_us in pairs(refunded) do count = count - (at_us >= since_us and 1 or 0) end
  return count
end

local function begin_period(remaining, used)
  account.period, account.remaining, account.used = account.period + 1, remaining, used
  account.other_reset_us, account.other_read_us, account.refresh_owed = false, false, 1
end

local function take(bucket, not_before_us, can_refresh) -- what is left; or nil, a reason and a wait
  local due, wait_us = is_reset_due(), 0
  local used = due and early() or account.used
  local left = (due and account.total - used or account.remaining) - 1
  local opens_us = max(bucket.last_us + bucket.hold_us + account.window_us, bucket.closed_until_us, not_before_us)
  if opens_us > now then
    wait_us = max(closed_until(bucket), not_before_us) - now
    bucket.last_us = min(bucket.last_us, now)
    bucket.closed_until_us = min(bucket.closed_until_us, now + max_closure(bucket.rejections))
  end
  if left < request.reserve then
    local in_us = account.resets_at_us and resets_in() or 0
    if in_us == 0 then
      in_us, account.max_reset_us = account.period_us, account.period_us
      if due and used > 0 then begin_period(max(0, account.total - used), used) end
    end
    account.resets_at_us = wall + in_us
    return nil, BUDGET, max(wait_us, in_us)
  end
  if wait_us > 0 then return nil, WINDOW, wait_us end
  if can_refresh and (due or account.refresh_owed == 1) then return nil, RESET end
  if due then begin_period(left, used) end
  if due or not account.resets_at_us then
    account.resets_at_us, account.max_reset_us = wall + account.period_us, account.period_us
  end
  account.remaining, account.used, account.granted = left, used + 1, account.granted + 1
  bucket.previous_us, bucket.previous_serial = bucket.last_us, bucket.serial
  bucket.last_us, bucket.serial = now, account.granted
  return left
end

local function sent(bucket, serial, at_us)
  bucket.last_us = max(bucket.last_us, at_us)
  if bucket.serial == serial then bucket.hold_us = 0 else bucket.previous_us = bucket.last_us end
end

local function unused(bucket, serial, period)
  local at_us = not refunded[serial] and redis.call('ZSCORE', RECENT, whole(serial))
  if bucket.serial == serial then
    bucket.last_us, bucket.hold_us, bucket.serial = bucket.previous_us, 0, bucket.previous_serial
  end
  if account.total and account.period == period then
    if at_us or not has_reader() then account.remaining = min(account.remaining + 1, account.total) end
    account.used = max(0, account.used - 1)
  end
  if at_us then refunded[serial] = tonumber(at_us) end
  write('ZREM', RECENT, whole(serial))
end

local function rejected(bucket, serial, at_us)
  local last = bucket.rejected_serial
  if serial < last then bucket.closed_until_us = max(bucket.closed_until_us, at_us + 2 * account.window_us) end
  if serial <= last then return end
  local goes_on = last == bucket.serial or last == bucket.previous_serial
  bucket.rejections, bucket.rejected_serial = goes_on and min(bucket.rejections + 1, 32) or 1, serial
  local closed_us = min(account.window_us * 2 ^ bucket.rejections, max_closure(bucket.rejections))
  bucket.closed_until_us = max(bucket.closed_until_us, at_us + closed_us)
  rejections[#rejections + 1] = {serial, bucket.rejections}
end

-- turns.py ------------------------------------------------------------------------------------------------------

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
  local due, back = due_us(bucket), account.period - period
  local is_after_loss = back >= 0 and back < MAX_PERIODS_BACK
  at_us = min(now, at_us + shift_us)
  if kind == UNUSED then
    if is_after_loss then unused(bucket, serial, period) end
  else
    sent(bucket, is_after_loss and serial or -1, at_us)
  end
  if kind == REJECTED then rejected(bucket, serial, at_us) end
  if now < due and due > due_us(bucket) then bucket.opened_us = min(due, now + notice_us) end
end

local function left_now() -- -1 while heads wait for the limit
  if not account.total or is_reset_due() then return -1 end
  return account.resets_at_us and resets_in() == 0 and account.total or account.remaining
end

local function reports()
  local before = left_now()
  for _, one in ipairs(request.reports) do report(unpack(one)) end
  if before <= request.reserve and request.reserve < left_now() then account.opened_us = now + notice_us end
end

local function put_line(bucket, new) -- nil: the session has none
  local lines = {new}
  for _, line in ipairs(bucket.lines) do
    if line[ID] ~= request.session then lines[#lines + 1] = line end
  end
  bucket.lines = lines
end

local function ask(number, head) -- a permit, or a wait
  local bucket, resets_at_us, ahead = get_bucket(number), account.resets_at_us, {}
  for _, line in ipairs(bucket.lines) do
    local later_us = line[HEAD] - head[POSITION]
    local before = later_us < 0 or later_us == 0 and line[ID] < request.session
    if before and line[UNTIL] - now > 0 and line[ID] ~= request.session then ahead[#ahead + 1] = line end
  end
  local since_us = resets_at_us and wall - resets_at_us or -1
  local reads = request.can_read ~= 0 or has_reader()
  local reset_us = since_us >= 0 and now - since_us + (since_us >= PATIENCE and reads and PATIENCE or 0) or NEVER
  local graces_us, due = #ahead * min(S / 10, floor(account.window_us / 5)), due_us(bucket)
  local turn_us, left, reason, wait_us = due, nil, RESET, READ_AGAIN
  if #ahead > 0 then
    turn_us = max(due, account.opened_us, bucket.opened_us, reset_us)
    turn_us = max(turn_us + graces_us, now + head[ONCE])
  end
  if account.total then
    account.reserve = request.reserve
    left, reason, wait_us = take(bucket, turn_us, reads and since_us >= 0 and since_us < PATIENCE)
    if reason == BUDGET then wait_us = wait_us + graces_us end
    if reason == RESET then wait_us = min(READ_AGAIN, PATIENCE - since_us) + graces_us end
    if reason == WINDOW then
      wait_us = due + graces_us > now and due + graces_us - now or min(wait_us, account.window_us)
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
  bucket.hold_us, account.held_us = head[HOLD], max(account.held_us, head[HOLD])
  for _, line in ipairs(ahead) do line[UNTIL] = whole(now) end
  write('ZADD', RECENT, whole(wall), whole(account.granted))
  write('ZREMRANGEBYSCORE', RECENT, '-inf', '(' .. whole(wall - 2 * UNSEEN))
  return {head[NUMBER], account.granted, number, head[SHARD_ID], account.period, left, 0}
end

local function replace_line(number, more, waiters)
  for _, waiter in ipairs(waiters) do
    if math.fmod(waiter[SHARD_ID], account.max_concurrency) ~= number then return end
  end
  local bucket, known, wait, count = get_bucket(number), {}, nil, 0
  for _, line in ipairs(bucket.lines) do
    local own = line[ID] == request.session and cjson.decode(line[FIRST]) or {}
    for _, waiter in ipairs(own) do known[waiter[NUMBER]] = waiter end
  end
  for _, waiter in ipairs(waiters) do
    local before = known[waiter[NUMBER]]
    for _, at in ipairs({ARRIVED, POSITION}) do
      local us = waiter[at] + shift_us
      waiter[at] = before and min(us, before[at]) or us
    end
  end
  while #waiters > 0 do
    local permit, denied = ask(number, waiters[1])
    permits[#permits + 1], wait = permit, denied or wait
    if denied and waiters[1][ONCE] == 0 then break end
    table.remove(waiters, 1)
  end
  put_line(bucket, #waiters > 0 and {
    request.session, whole(now + request.lease_us), whole(waiters[1][POSITION]), whole(#waiters + more),
    to_json(waiters),
  } or nil)
  for _, line in ipairs(bucket.lines) do count = count + line[WAITING] end
  if wait then wait[5] = count end
  waits[#waits + 1] = wait
end

local function reads(uses) -- whether this process should read the limit now, for all
  local own, claimed = account.reader == request.session, account.reader ~= '' and now < account.reader_until_us
  local due = not account.total or account.refresh_owed == 1 or reset_denied or uses and now >= account.read_due_us
  due = due or #new > 0 and now >= account.read_us + 60 * S
  if request.can_read == 0 and own then account.reader = '' end
  if request.can_read == 0 or not due or claimed and not own then return 0 end
  if not claimed then account.reader, account.reader_until_us = request.session, now + 10 * S end
  return 1
end

local function reply(read)
  local in_us = account.total and account.resets_at_us and resets_in() or 0
  local remaining = account.resets_at_us and in_us == 0 and account.total or account.remaining
  return to_json({
    request.attempt, request.number, 0, '', 0, now, account.granted, account.period, account.layout,
    account.total or -1, account.total and remaining or 0, in_us, account.max_concurrency,
    account.interval_us, account.margin_us, now < account.differs_until_us and 1 or 0, read, 0, -1, rejections,
    permits, waits, {},
  })
end

local function apply()
  local uses, at = false, whole(now)
  bound_times(account, {
    interval_until_us = 130 * S, margin_until_us = 130 * S, differs_until_us = 60 * S, opened_us = 2 * S,
    settle_until_us = 2 * S, reader_until_us = 10 * S, read_us = 0,
  })
  if request.reread_us ~= 0 then bound_times(account, {read_due_us = max(request.reread_us, 60 * S)}) end
  if #new > 0 and account.bot == '' then account.bot = new[BOT] end
  settings()
  reports()
  for _, line in ipairs(request.lines) do
    uses = uses or #line[3] > 0
    if request.layout == account.layout then replace_line(unpack(line)) end
  end
  local text = reply(reads(uses))
  account.changed = at .. ' ' .. tag
  if account.run == '' then account.run = run end
  if account.replid == '' then account.replid = replid end
  write('HSET', LEDGER, 'account', object(account))
  for number, bucket in pairs(buckets) do
    for place, line in ipairs(bucket.lines) do bucket.lines[place] = table.concat(line, ' ') end
    write('HSET', LEDGER, whole(number), object(bucket))
  end
  local row = table.concat({whole(request.number), at, account.created, text}, ' ')
  write('SET', SESSION, row, 'PX', SILENT / 1000)
  save()
  return text
end

-- Which requests are answered here ------------------------------------------------------------------------------

local function lost() -- whether this is another server than the account's, or was restarted
  local other_run = account.run ~= '' and run ~= '' and account.run ~= run
  return other_run or account.replid ~= '' and replid ~= '' and account.replid ~= replid
end

local function is_bounded() -- as bounds.py, which a process asks first: larger values would stop all others
  local day, is_fine = 86400 * S, true
  for name, most in pairs({
    interval_us = 60 * S, margin_us = 10 * S, lease_us = 60 * S, period_us = 2 * day, reread_us = 366 * day,
  }) do is_fine = is_fine and request[name] >= 0 and request[name] <= most end
  return is_fine
end

local function is_forgotten() -- whether Discord's default may have to replace a forgotten limit
  return not account.total and request.can_read == 0 and is_reset_due()
end

local function rows(text) -- what is stored
  return {
    tag, text, whole(now), whole(wall), run, replid, redis.call('GET', SESSION), redis.call('GET', REPLACED),
    redis.call('HGETALL', LEDGER), redis.call('ZRANGE', RECENT, 0, -1, 'WITHSCORES'),
  }
end

local function begins_plainly() -- whether this introduction only adds a session
  local other_bot = account.bot ~= '' and new[BOT] ~= '' and account.bot ~= new[BOT]
  return #new[LIMIT] == 0 and new[GRANTED] <= account.granted and not other_bot and not redis.call('GET', REPLACED)
end

local claim = request.session ~= '' and redis.call('GET', CLAIM)
if claim and claim ~= request.session then return {tag, 'busy'} end
if claim then write('UNLINK', CLAIM) end
local changed = account and account.changed or ''
if ARGV[2] == 'store' and ARGV[3] == changed then
  for _, words in ipairs(cjson.decode(ARGV[4])) do
    words[2] = KEYS[words[2]]
    write(unpack(words))
  end
  save()
  return {tag, 'stored'}
end
local number, at, created = string.match(session or '', '^(%d+) (%d+) (%S+)')
local is_plain = account and #given[16] == 0 and is_bounded() and not lost() and not is_forgotten()
if #new > 0 then
  is_plain = is_plain and not session and begins_plainly()
else -- `created` is another one if the key `ledger` was deleted
  is_plain = is_plain and number and request.number == number + 1 and now - at <= SILENT and created == account.created
end
if ARGV[2] ~= 'read' and is_plain then
  local text = apply()
  return request.look ~= 0 and rows(text) or {tag, text}
end
local is_new = #new > 0 and not session or number and request.number > tonumber(number) -- no copy of it was stored
if ARGV[2] == 'store' and is_new then
  local trip_ms = floor((now - ARGV[5]) / 1000)
  write('SET', CLAIM, request.session, 'PX', whole(min(max(1000, 2 * trip_ms), 4000)))
  save()
end
return rows('')
