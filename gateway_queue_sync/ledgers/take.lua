-- Answers one request of a process, in one step: what turns.py and rules.py say, for Redis.
--
-- The comments there hold here; functions have the same names, and stand in the same order. Times are
-- microseconds of this server's clock. They are whole numbers below 2^53, which Lua holds exactly, but
-- writes with 14 digits unless told otherwise: so `whole` writes them.
--
-- An account that another run of a server has kept (it was restarted, or failed over) may be an older one:
-- what was granted since is not in it, and no bucket grants for a window.
--
-- KEYS  1 account   hash: its fields, the server's run, and `b:<number>` for each bucket
--       2 process   sorted set: owner by when its lease ends
--       3 void      hash: owner -> up to which of its requests it has given them up
--       4 head      hash: `<number> <owner>` -> ticket, shard id, place
--       5 permit    hash: `<owner> <ticket>` -> serial, shard id, bucket, stamp, remaining, period,
--                   returned, refused
--       6 waiter    hash: `<owner> <ticket>` -> shard id, arrival, place
-- ARGV  1 the request as JSON   2, 3 the time by both clocks, if it is not this server's (for tests)

local ACCOUNT, PROCESS, VOID, HEAD, PERMIT, WAITER = unpack(KEYS)
local NEVER = -2 ^ 62
local MAX_CLOSURE, MIN_REREAD = 60e6, 1e6
local MANY_REJECTIONS, MAX_LONG_CLOSURE = 10, 900000000
local MAX_GRACE, FORGOTTEN_AFTER, SETTLED_AFTER = 100e3, 60e6, 600e6
local GRANT, WINDOW, BUDGET, RESET = 1, 2, 3, 4
local NUMBERS = {
  'window_us', 'period_us', 'max_concurrency', 'total', 'remaining', 'resets_at_us', 'span_us', 'period',
  'refresh_owed', 'granted', 'interval_us', 'margin_us', 'interval_until_us', 'margin_until_us',
  'opened_us', 'refresh_until_us', 'reserve', 'fresh_last_us', 'fresh_closed_until_us',
}
local NOT_BEGUN = NEVER -- a period that ends then has not begun

local request = cjson.decode(ARGV[1])
local owner = request.owner
local now, wall
if ARGV[2] then
  now, wall = tonumber(ARGV[2]), tonumber(ARGV[3])
else
  local time = redis.call('TIME')
  now = time[1] * 1e6 + time[2]
  wall = now
end
local info = redis.pcall('INFO', 'server') -- a user who may not ask is told an error
local run = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
local shift = request.at_us and now - request.at_us or 0
local account, buckets = {}, {}
local new, relaid = false, false
local outcome = {0, 0, 0, 0, 0, 0}

local function whole(number)
  return string.format('%.0f', number)
end

local function words(...)
  local written = {}
  for place, word in ipairs({...}) do
    written[place] = type(word) == 'number' and whole(word) or word
  end
  return table.concat(written, ' ')
end

local function numbers(text)
  local read = {}
  for word in string.gmatch(text, '%S+') do
    read[#read + 1] = tonumber(word)
  end
  return read
end

local function pairs_of(key)
  local flat, found = redis.call('HGETALL', key), {}
  for place = 1, #flat, 2 do
    found[flat[place]] = flat[place + 1]
  end
  return found
end

-- the store -----------------------------------------------------------------------------------------

local function load_account()
  local values = redis.call('HMGET', ACCOUNT, 'refresher', 'run', unpack(NUMBERS))
  if not values[3] then
    return false
  end
  account.refresher, account.run = values[1], values[2] or ''
  for place, name in ipairs(NUMBERS) do
    account[name] = tonumber(values[place + 2])
  end
  return true
end

local function read_bucket(text)
  local n = numbers(text)
  return {
    last = n[1], serial = n[2], before = n[3], before_serial = n[4], closed_until = n[5], row = n[6],
    rejected_serial = n[7],
  }
end

local function load_buckets()
  if relaid then
    return
  end
  for field, text in pairs(pairs_of(ACCOUNT)) do
    local number = tonumber(string.match(field, '^b:(%d+)$'))
    if number and not buckets[number] then
      buckets[number] = read_bucket(text)
    end
  end
end

local function keep()
  if relaid then
    redis.call('DEL', ACCOUNT)
  end
  local fields = {'refresher', account.refresher, 'run', run ~= '' and run or account.run}
  for _, name in ipairs(NUMBERS) do
    fields[#fields + 1] = name
    fields[#fields + 1] = whole(account[name])
  end
  for number, b in pairs(buckets) do
    fields[#fields + 1] = 'b:' .. whole(number)
    fields[#fields + 1] =
      words(b.last, b.serial, b.before, b.before_serial, b.closed_until, b.row, b.rejected_serial)
  end
  for first = 1, #fields, 4000 do -- unpack has its limits
    redis.call('HSET', ACCOUNT, unpack(fields, first, math.min(first + 3999, #fields)))
  end
end

local function heads(number)
  local alive, fields = redis.call('ZRANGEBYSCORE', PROCESS, '(' .. whole(now), '+inf'), {}
  for place, name in ipairs(alive) do
    fields[place] = words(number, name)
  end
  local found = {}
  for first = 1, #fields, 4000 do
    local texts = redis.call('HMGET', HEAD, unpack(fields, first, math.min(first + 3999, #fields)))
    for place, text in ipairs(texts) do
      if text then
        local n = numbers(text)
        found[#found + 1] =
          {owner = alive[first + place - 1], ticket = n[1], shard_id = n[2], place = n[3]}
      end
    end
  end
  return found
end

local function put_waiter(ticket, shard_id, arrived, place)
  local field = words(owner, ticket)
  local text = redis.call('HGET', WAITER, field)
  if text then
    local n = numbers(text)
    arrived, place = math.min(arrived, n[2]), math.min(place, n[3])
  end
  redis.call('HSET', WAITER, field, words(shard_id, arrived, place))
end

local function put_head(number, head)
  redis.call('HSET', HEAD, words(number, head.owner), words(head.ticket, head.shard_id, head.place))
end

local function drop_head(ticket, shard_id)
  local field = words(shard_id % account.max_concurrency, owner)
  local text = redis.call('HGET', HEAD, field)
  if text and numbers(text)[1] == ticket then
    redis.call('HDEL', HEAD, field)
  end
end

local function load_permit(ticket)
  local text = redis.call('HGET', PERMIT, words(owner, ticket))
  if not text then
    return nil
  end
  local n = numbers(text)
  return {
    ticket = ticket, serial = n[1], shard_id = n[2], bucket = n[3], stamp = n[4], remaining = n[5],
    period = n[6], returned = n[7], refused = n[8],
  }
end

local function put_permit(p)
  redis.call('HSET', PERMIT, words(owner, p.ticket), words(
    p.serial, p.shard_id, p.bucket, p.stamp, p.remaining, p.period, p.returned, p.refused))
end

local function forget_permits(period, before)
  for field, text in pairs(pairs_of(PERMIT)) do
    local n = numbers(text)
    if n[6] < period and n[4] < before then
      redis.call('HDEL', PERMIT, field)
    end
  end
end

local function forget_silent(before)
  local silent = redis.call('ZRANGEBYSCORE', PROCESS, '-inf', '(' .. whole(before))
  if #silent == 0 then
    return
  end
  local gone = {}
  for _, name in ipairs(silent) do
    gone[name] = true
    redis.call('ZREM', PROCESS, name)
    redis.call('HDEL', VOID, name)
  end
  for _, field in ipairs(redis.call('HKEYS', HEAD)) do
    if gone[string.match(field, ' (.*)$')] then
      redis.call('HDEL', HEAD, field)
    end
  end
  for _, field in ipairs(redis.call('HKEYS', WAITER)) do
    if gone[string.match(field, '^(.*) ')] then
      redis.call('HDEL', WAITER, field)
    end
  end
end

-- rules.py ------------------------------------------------------------------------------------------

local function bucket_of(shard_id)
  local number = shard_id % account.max_concurrency
  local bucket = buckets[number]
  if not bucket and not relaid then
    local text = redis.call('HGET', ACCOUNT, 'b:' .. whole(number))
    bucket = text and read_bucket(text)
  end
  bucket = bucket or {
    last = account.fresh_last_us, serial = 0, before = NEVER, before_serial = 0,
    closed_until = account.fresh_closed_until_us, row = 0, rejected_serial = -1,
  }
  buckets[number] = bucket
  return bucket
end

local function max_closure(rejections) -- nil: none
  local max = (rejections or 0) >= MANY_REJECTIONS and MAX_LONG_CLOSURE or MAX_CLOSURE
  return math.max(max, 2 * account.window_us)
end

local function closed_for(bucket)
  local closed_until = math.min(bucket.closed_until, now + max_closure(bucket.row))
  return math.max(math.min(bucket.last, now) + account.window_us, closed_until) - now
end

local function is_due()
  return account.resets_at_us ~= NOT_BEGUN and wall >= account.resets_at_us
end

local function resets_in()
  if account.resets_at_us == NOT_BEGUN then
    return 0
  end
  return math.min(math.max(account.resets_at_us - wall, 0), account.span_us)
end

-- Returns a permit, or nil and why not and how long.
local function take(shard_id, reserve, can_refresh, not_before)
  local bucket = bucket_of(shard_id)
  local wait = bucket.last + account.window_us - now
  if wait > 0 or bucket.closed_until > now or not_before > now then
    bucket.last = math.min(bucket.last, now)
    bucket.closed_until = math.min(bucket.closed_until, now + max_closure(bucket.row))
    wait = math.max(closed_for(bucket), not_before - now)
  end
  local due = is_due()
  if (due and account.total or account.remaining) <= reserve then
    local in_us = resets_in()
    if in_us <= 0 then
      in_us = account.period_us
      account.span_us = in_us
    end
    account.resets_at_us = wall + in_us
    return nil, BUDGET, in_us
  end
  if wait > 0 then
    return nil, WINDOW
  end
  if can_refresh and (due or account.refresh_owed == 1) then
    return nil, RESET
  end
  if due then
    account.remaining, account.resets_at_us = account.total - 1, NOT_BEGUN
    account.period = account.period + 1
  else
    account.remaining = account.remaining - 1
  end
  if account.resets_at_us == NOT_BEGUN then
    account.resets_at_us, account.span_us = wall + account.period_us, account.period_us
  end
  account.granted = account.granted + 1
  bucket.before, bucket.before_serial = bucket.last, bucket.serial
  bucket.last, bucket.serial = now, account.granted
  return {
    serial = account.granted, shard_id = shard_id, bucket = shard_id % account.max_concurrency,
    stamp = now, remaining = account.remaining, period = account.period, returned = 0, refused = 0,
  }
end

local function sent(permit, at)
  local bucket = bucket_of(permit.shard_id)
  bucket.last = math.max(bucket.last, at)
  if bucket.serial ~= permit.serial then
    bucket.before = bucket.last
  end
end

local function unused(permit)
  permit.returned = 1
  if account.period == permit.period then
    account.remaining = math.min(account.remaining + 1, account.total)
  end
  local bucket = bucket_of(permit.shard_id)
  if bucket.serial == permit.serial then
    bucket.last, bucket.serial = bucket.before, bucket.before_serial
  end
end

local function rejected(permit, at)
  local bucket = bucket_of(permit.shard_id)
  local last = bucket.rejected_serial
  if last == permit.serial then
    return -- repeated
  end
  local goes_on = last == bucket.serial or last == bucket.before_serial
  bucket.row = goes_on and math.min(bucket.row + 1, 32) or 1
  bucket.rejected_serial = math.max(bucket.rejected_serial, permit.serial)
  local closed = math.min(account.window_us * 2 ^ bucket.row, max_closure(bucket.row))
  bucket.closed_until = math.max(bucket.closed_until, at + closed)
end

local function adopt(limit)
  local untouched = limit.remaining == limit.total and limit.reset_after_us == 0
  if limit.max_concurrency ~= account.max_concurrency then
    load_buckets()
    local last, closed_until = account.fresh_last_us, account.fresh_closed_until_us
    for _, bucket in pairs(buckets) do
      last = math.max(last, bucket.last)
      closed_until = math.max(closed_until, bucket.closed_until)
    end
    account.fresh_last_us, account.fresh_closed_until_us = last, closed_until
    buckets, relaid = {}, true
  end
  account.max_concurrency = limit.max_concurrency
  account.total, account.remaining = limit.total, limit.remaining
  account.resets_at_us = untouched and NOT_BEGUN or wall + limit.reset_after_us
  account.span_us = limit.reset_after_us
  account.period = account.period + 1
  account.refresh_owed = 0
end

local function renew(limit, period, granted)
  if account.period ~= period then
    return false
  end
  limit.remaining = math.max(0, limit.remaining - math.max(0, account.granted - granted))
  if limit.remaining < limit.total then
    limit.reset_after_us = math.max(limit.reset_after_us, MIN_REREAD)
  end
  adopt(limit)
  return true
end

local function trust(period)
  if account.period ~= period then
    return false
  end
  account.refresh_owed = 1
  return true
end

local function budget()
  local in_us = resets_in()
  local due = account.resets_at_us ~= NOT_BEGUN and in_us == 0
  return account.total, due and account.total or account.remaining, in_us
end

-- turns.py ------------------------------------------------------------------------------------------

local function begin()
  new, relaid = true, true
  account = {
    window_us = request.interval_us + request.margin_us, period_us = request.period_us,
    max_concurrency = 1, total = 0, remaining = 0, resets_at_us = NOT_BEGUN, span_us = 0,
    period = request.period, refresh_owed = 0, granted = request.granted, interval_us = 0,
    margin_us = 0, interval_until_us = NEVER, margin_until_us = NEVER, opened_us = NEVER,
    refresher = '', run = '', refresh_until_us = NEVER, reserve = 0, fresh_last_us = now,
    fresh_closed_until_us = NEVER,
  }
  local order = request.order
  local fresh = order and (order.kind == 'open' or order.kind == 'renew')
  adopt(fresh and order.limit or request.limit)
  account.refresh_owed = fresh and 0 or 1
end

local function agree_on_window()
  local until_us = now + request.lease_us + request.interval_us + request.margin_us
  if request.interval_us >= account.interval_us or now >= account.interval_until_us then
    account.interval_us, account.interval_until_us = request.interval_us, until_us
  end
  if request.margin_us >= account.margin_us or now >= account.margin_until_us then
    account.margin_us, account.margin_until_us = request.margin_us, until_us
  end
  account.window_us = account.interval_us + account.margin_us
  account.period_us = request.period_us
end

local function longest_sleep()
  return math.floor(request.lease_us / 3)
end

local function open_by_surprise()
  account.opened_us = now + longest_sleep()
end

local function give_back(permit)
  if permit then
    unused(permit)
    open_by_surprise()
    put_permit(permit)
  end
end

local function hear(news)
  local ticket, at = news.ticket, news.at_us + shift
  local permit = load_permit(ticket)
  local held = permit and permit.returned == 0 and permit or nil
  if news.kind == 'joined' then
    if not held then
      put_waiter(ticket, news.shard_id, at, news.place_us + shift)
    end
  elseif news.kind == 'left' then
    redis.call('HDEL', WAITER, words(owner, ticket))
    drop_head(ticket, news.shard_id)
    give_back(held)
  elseif news.kind == 'unused' then
    give_back(held and held.serial == news.serial and held or nil)
  else
    local lost_permit = not permit or permit.serial ~= news.serial
    if lost_permit then
      permit = {serial = news.serial, shard_id = news.shard_id, refused = 0}
    end
    at = math.min(at, now)
    if news.kind == 'sent' then
      sent(permit, at)
    elseif permit.refused == 0 then
      permit.refused = 1
      rejected(permit, at)
      if not lost_permit then
        put_permit(permit)
      end
    end
  end
end

local function open_with(limit)
  local period, owed, total, remaining, in_us = account.period, account.refresh_owed, budget()
  local runs = in_us > 0
  if runs then
    if limit.remaining >= remaining then
      limit.remaining, limit.reset_after_us = math.min(remaining, limit.total), in_us
    else
      limit.reset_after_us = math.max(limit.reset_after_us, in_us)
    end
  end
  adopt(limit)
  if runs then
    account.period, account.refresh_owed = period, owed
  end
end

local function begin_windows_anew()
  load_buckets()
  local closed_until = account.fresh_closed_until_us
  for _, bucket in pairs(buckets) do
    closed_until = math.max(closed_until, bucket.closed_until)
  end
  account.fresh_last_us, account.fresh_closed_until_us = now, closed_until
  buckets, relaid = {}, true
  account.refresh_owed = 1
end

local function is_before(one, other)
  if one.place ~= other.place then
    return one.place < other.place
  end
  return one.owner < other.owner
end

local function rebucket_heads()
  local all = {}
  for field, text in pairs(pairs_of(HEAD)) do
    local n = numbers(text)
    all[#all + 1] =
      {owner = string.match(field, ' (.*)$'), ticket = n[1], shard_id = n[2], place = n[3]}
  end
  table.sort(all, function(one, other) return is_before(other, one) end)
  redis.call('DEL', HEAD)
  for _, head in ipairs(all) do
    put_head(head.shard_id % account.max_concurrency, head)
  end
end

local function make_good()
  begin_windows_anew()
  open_with(request.limit)
  account.period = math.max(account.period, request.period)
  account.granted, account.refresh_owed = request.granted, 1
  rebucket_heads()
end

local function obey(order)
  if account.refresher == owner then
    account.refresher = ''
  end
  if order.kind == 'trust' then
    return trust(order.period)
  end
  if not order.limit or new and (order.kind == 'open' or order.kind == 'renew') then
    return true
  end
  local other_buckets = order.limit.max_concurrency ~= account.max_concurrency
  if order.kind == 'renew' then
    if not renew(order.limit, order.period, order.granted) then
      return false
    end
  elseif order.kind == 'open' then
    open_with(order.limit)
  else
    adopt(order.limit)
  end
  if other_buckets or order.kind ~= 'open' then
    open_by_surprise()
  end
  return true
end

local function grace()
  return math.min(MAX_GRACE, math.floor(account.window_us / 5))
end

local function opens(bucket)
  local at = now + closed_for(bucket)
  if is_due() then
    at = math.max(at, now - (wall - account.resets_at_us))
  end
  return at
end

local function turn(rank, opens_at)
  if rank > 0 and opens_at <= now then
    opens_at = math.max(opens_at, math.min(account.opened_us, now + longest_sleep()))
  end
  return opens_at + rank * grace()
end

local function claim_refresh()
  local left = math.min(account.refresh_until_us - now, request.lease_us)
  if account.refresher ~= '' and account.refresher ~= owner and left > 0 then
    return math.min(left, MAX_GRACE)
  end
  account.refresher, account.refresh_until_us = owner, now + request.lease_us
  return 0
end

local function sleep(rank, opens_at, turn_at)
  local us = opens_at - now + math.min(rank, 2) * grace() + math.max(0, rank - 2) * account.window_us
  if us <= 0 then
    us = math.min(turn_at - now, account.window_us)
  end
  return math.min(math.max(1, us), longest_sleep())
end

local function tell_grant(permit, next_us)
  local age = math.max(0, now - permit.stamp)
  outcome = {GRANT, age, permit.serial, permit.bucket, permit.remaining, next_us}
end

local function tell_denial(reason, resets_in_us, rank, opens_at, turn_at)
  local us
  if reason == RESET then
    us = claim_refresh()
  else
    if reason == BUDGET then
      opens_at = math.max(opens_at, now + resets_in_us)
    end
    us = sleep(rank, opens_at, turn_at)
  end
  outcome = {reason, us, 0, 0, 0, 0}
end

local function ahead_of(head, all)
  local found = {}
  for _, other in ipairs(all) do
    if other.owner ~= head.owner and is_before(other, head) then
      found[#found + 1] = other.owner
    end
  end
  return found
end

local function stand(number, head, at_us)
  put_head(number, head)
  put_waiter(head.ticket, head.shard_id, at_us + shift, head.place)
end

local function hand_on(wish, number)
  local heir = wish.next
  if not heir or heir.shard_id % account.max_concurrency ~= number then
    return 0
  end
  if account.remaining <= wish.reserve or load_permit(heir.ticket) then
    return 0
  end
  local head = {
    owner = owner, ticket = heir.ticket, shard_id = heir.shard_id, place = heir.place_us + shift,
  }
  stand(number, head, heir.at_us)
  local opens_at = now + account.window_us
  return sleep(#ahead_of(head, heads(number)), opens_at, opens_at)
end

local function answer_take(wish)
  account.reserve = wish.reserve
  local permit = load_permit(wish.ticket)
  if permit and permit.returned == 0 then
    return tell_grant(permit, 0)
  end
  local number = wish.shard_id % account.max_concurrency
  local bucket = bucket_of(wish.shard_id)
  local head = {
    owner = owner, ticket = wish.ticket, shard_id = wish.shard_id, place = wish.place_us + shift,
  }
  local all = heads(number)
  for _, other in ipairs(all) do
    if other.owner == owner and other.ticket == wish.ticket then
      head.place = math.min(head.place, other.place)
    end
  end
  local ahead = ahead_of(head, all)
  local opens_at, period = opens(bucket), account.period
  local turn_at = turn(#ahead, opens_at)
  if #ahead > 0 and not wish.stays then
    turn_at = math.max(turn_at, now + 1)
  end
  local reason, resets_in_us
  permit, reason, resets_in_us = take(wish.shard_id, wish.reserve, wish.can_refresh, turn_at)
  if not permit then
    if wish.stays then
      stand(number, head, wish.at_us)
    end
    return tell_denial(reason, resets_in_us, #ahead, opens_at, turn_at)
  end
  if account.period ~= period then
    account.opened_us = math.max(account.opened_us, opens_at)
  end
  permit.ticket = wish.ticket
  put_permit(permit)
  drop_head(wish.ticket, wish.shard_id)
  redis.call('HDEL', WAITER, words(owner, wish.ticket))
  for _, name in ipairs(ahead) do
    redis.call('ZADD', PROCESS, whole(now), name)
  end
  forget_silent(now - FORGOTTEN_AFTER)
  tell_grant(permit, hand_on(wish, number))
end

local function look()
  local ready, waiting = {}, {}
  load_buckets()
  for number, bucket in pairs(buckets) do
    ready[#ready + 1] = {number, math.max(0, closed_for(bucket))}
  end
  local fresh = {last = account.fresh_last_us, closed_until = account.fresh_closed_until_us}
  local alive = {}
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', PROCESS, '(' .. whole(now), '+inf')) do
    alive[name] = true
  end
  for field, text in pairs(pairs_of(WAITER)) do
    if alive[string.match(field, '^(.*) ')] then
      local n = numbers(text)
      waiting[#waiting + 1] = {tonumber(string.match(field, ' (.*)$')), n[1], n[2], n[3]}
    end
  end
  return ready, math.max(0, closed_for(fresh)), waiting
end

local function reply(known, booked, void)
  local total, remaining, in_us = budget()
  local ready, others, waiting = {}, 0, {}
  if request.look then
    ready, others, waiting = look()
  end
  return {
    request.number, void and 1 or 0, known and 1 or 0, booked and 1 or 0, total, remaining, in_us, account.max_concurrency,
    account.period, account.granted, account.interval_us, account.margin_us, account.period_us,
    account.reserve, outcome, ready, others,
    waiting, now,
  }
end

local other_run = false
if not load_account() then
  begin()
elseif run ~= '' and account.run ~= '' and run ~= account.run then
  other_run = true
  begin_windows_anew()
end
if owner == '' then
  return reply(not new, false)
end
local given_up = math.max(request.void, tonumber(redis.call('HGET', VOID, owner) or 0))
redis.call('HSET', VOID, owner, whole(given_up)) -- the first to write: refused where memory is short
if new then
  redis.call('DEL', PROCESS, HEAD, PERMIT, WAITER)
elseif other_run then
  redis.call('DEL', PROCESS, HEAD, WAITER) -- whoever waits is told anew
end
local period = account.period
local known = redis.call('ZADD', PROCESS, whole(now + request.lease_us), owner) == 0
if request.number <= given_up then
  return reply(known, false, true)
end
if request.granted > account.granted then
  make_good()
end
agree_on_window()
for _, news in ipairs(request.news) do
  hear(news)
end
local booked = request.order and obey(request.order)
if relaid then
  rebucket_heads()
end
if request.take then
  answer_take(request.take)
end
if account.period ~= period then
  forget_permits(account.period - 1, now - SETTLED_AFTER)
end
keep()
return reply(known, booked)
