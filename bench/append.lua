-- Appends one chunk a request, to 32 threads in turn.
local turn, bodies = 0, {}
wrk.headers["Content-Type"] = "application/json"
function request()
   turn = turn + 1
   return wrk.format("POST", "/api/threads/t" .. turn % 32 .. "/messages/m/chunks", nil, '{"content":"word"}')
end
