-- Posts one body to `count` paths in turn, prefix1suffix, prefix2suffix, …; says what came of it in JSON.
-- With "hunt" as the fifth argument it stops at the first answer that is not 2xx, and shows it.
local requests, turn = {}, 0

function init(args)
  local prefix, count, suffix, body, hunt = args[1], tonumber(args[2]), args[3], args[4], args[5]
  local headers = { ["Content-Type"] = "application/json" }
  for number = 1, count do
    requests[number] = wrk.format("POST", prefix .. number .. suffix, headers, body)
  end
  if hunt then
    response = function(status, _, text)
      if status < 200 or status > 299 then
        print("BAD " .. status .. " " .. text)
        wrk.thread:stop()
      end
    end
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format(
    'RESULT {"requests":%d,"seconds":%.6f,"bad_status":%d,"socket_errors":%d,"p50":%.3f,"p99":%.3f}',
    summary.requests, summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
