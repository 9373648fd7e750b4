-- Posts one body to `count` paths in turn, with 1, 2, 3 … for their `@`, and prints the result as JSON.
-- With "hunt" as the fourth argument, it stops at the first answer that is not 2xx and prints it.
local requests, turn = {}, 0

function init(args)
  local path, body, hunt = args[1], args[3], args[4]
  local headers = { ["Content-Type"] = "application/json" }
  for number = 1, tonumber(args[2]) do
    requests[number] = wrk.format("POST", (path:gsub("@", number)), headers, body)
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

function done(summary)
  local errors = summary.errors
  print(string.format(
    'RESULT {"requests":%d,"seconds":%.6f,"bad_status":%d,"socket_errors":%d}',
    summary.requests, summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
