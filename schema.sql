-- The database of resume-stream. Look inside while the service runs:
--
--   sqlite3 -readonly resume-stream.db 'select * from transcript'
--
-- Times are milliseconds since 1970 (UTC); the views show them as dates.

pragma application_id = 0x72737472; -- "rstr"
pragma user_version = 3;

-- One row. It makes each thread's generation higher than every earlier one,
-- whatever the clock does and whatever was deleted. If the file is doubtful (a
-- copy, or commits may be lost after a power cut), all threads get new
-- generations before the service serves it.
create table clock (
    latest_generation integer not null,
    is_doubtful       integer not null,
    owed              integer not null -- 1: cleared text has left traces to erase
) strict;

insert into clock values (0, 0, 0);

create table threads (
    thread      integer primary key autoincrement, -- never reused
    thread_id   text unique,                       -- null: cleared, to be erased
    generation  integer not null unique,
    last_seq    integer not null default 0,
    created_at  integer not null,
    updated_at  integer not null,
    touched_at  integer not null default 0         -- updated_at, rounded down to the minute
) strict;

create table messages (
    message     integer primary key,
    thread      integer not null references threads,
    message_id  text not null,
    status      text not null default 'active' check (status in ('active', 'completed', 'aborted')),
    reason      text,
    chunk_count integer not null default 0,
    size        integer not null default 0,        -- bytes of text, in UTF-8
    first_seq   integer,
    last_seq    integer,                           -- once ended: the place of its end
    created_at  integer not null,
    updated_at  integer not null,
    touched_at  integer not null default 0,        -- as in threads
    unique (thread, message_id)
) strict;

create index messages_by_status on messages (status, thread);

-- Indexes by age. Appends to a thread or message change them once a minute, not
-- with every chunk.
create index threads_by_age on threads (touched_at) where thread_id is not null;
create index active_messages_by_age on messages (touched_at) where status = 'active';

create table chunks (
    thread      integer not null references threads,
    seq         integer not null,
    message     integer not null references messages,
    event       text,
    content     text,                              -- null: the end of the message
    timestamp   integer not null,
    primary key (thread, seq)
) strict, without rowid;

-- Chunks and ends of ended messages, compressed by the service. A pack has the
-- places first_seq to last_seq as a JSON array of [message, event, content,
-- timestamp]. The view "entries" opens packs.
create table packs (
    thread      integer not null references threads,
    first_seq   integer not null,
    last_seq    integer not null,
    size        integer not null,                  -- bytes of the JSON text
    data        blob not null,                     -- zlib, for sqlar_uncompress
    primary key (thread, last_seq)
) strict;

-- All chunks and ends, packed or not. "first" and "last" are the ends of the row's
-- pack. To read a few places without opening other packs, ask for both: seq
-- between 5 and 9 and last >= 5 and first <= 9.
create view entries as
select thread, seq, message, event, content, timestamp, seq as first, seq as last
from chunks
union all
select
    packs.thread,
    cast(packs.first_seq + entry.key as integer),
    cast(entry.value ->> 0 as integer),
    cast(entry.value ->> 1 as text),
    cast(entry.value ->> 2 as text),
    cast(entry.value ->> 3 as integer),
    packs.first_seq,
    packs.last_seq
from packs cross join json_each(sqlar_uncompress(packs.data, packs.size)) as entry;

-- Packs never change: an update of an entry unpacks its pack.
create trigger entry_is_changed instead of update on entries
begin
    insert or ignore into chunks (thread, seq, message, event, content, timestamp)
    select thread, seq, message, event, content, timestamp from entries
    where thread = old.thread and last >= old.first and first <= old.last;

    delete from packs
    where thread = old.thread and last_seq = old.last and first_seq = old.first;

    update chunks
    set event = new.event, content = new.content, timestamp = new.timestamp
    where thread = old.thread and seq = old.seq;
end;

-- The text of a forgotten thread is still to be erased.
create trigger thread_is_forgotten after update of thread_id on threads
when new.thread_id is null
begin
    update clock set owed = 1;
end;

-- Deleting a thread deletes all of it. (Foreign keys would do this only if they
-- are on; in the sqlite3 shell they are off.)
create trigger thread_is_deleted after delete on threads
begin
    delete from chunks where thread = old.thread;
    delete from packs where thread = old.thread;
    delete from messages where thread = old.thread;
end;

-- Deleting a message deletes all of it, because its number may be reused. Its
-- places in the sequence stay empty. Other messages in its packs are unpacked.
create trigger message_is_deleted after delete on messages
begin
    delete from chunks
    where thread = old.thread and message = old.message and seq between old.first_seq and old.last_seq;

    insert or ignore into chunks (thread, seq, message, event, content, timestamp)
    select thread, seq, message, event, content, timestamp from entries
    where thread = old.thread and message <> old.message and last >= old.first_seq and first <= old.last_seq;

    delete from packs
    where thread = old.thread and last_seq >= old.first_seq and first_seq <= old.last_seq;
end;

-- Each end of a message takes a place in the sequence, whoever ends it.
create trigger message_ends after update of status on messages
when old.status = 'active' and new.status <> 'active'
begin
    update threads
    set last_seq = last_seq + 1,
        updated_at = cast(round((julianday('now') - 2440587.5) * 86400000) as integer)
    where thread = new.thread;

    insert into chunks (thread, seq, message, timestamp)
    select thread, last_seq, new.message, updated_at from threads where thread = new.thread;

    update messages
    set first_seq = coalesce(messages.first_seq, threads.last_seq),
        last_seq = threads.last_seq,
        updated_at = threads.updated_at
    from threads
    where messages.message = new.message and threads.thread = new.thread;
end;

create trigger message_stays_ended before update of status on messages
when old.status <> 'active' and new.status <> old.status
begin
    select raise(abort, 'this message has ended, and an end is final');
end;

-- Each thread with its totals. A thread is active while any of its messages is;
-- then it has the status of the message that ended last.
create view thread_summary as
select
    threads.thread,
    threads.generation,
    threads.thread_id,
    case
        when exists (select 1 from messages where messages.thread = threads.thread and status = 'active') then 'active'
        else (select status from messages where messages.thread = threads.thread order by last_seq desc limit 1)
    end as status,
    (select count(*) from messages where messages.thread = threads.thread) as message_count,
    (select coalesce(sum(chunk_count), 0) from messages where messages.thread = threads.thread) as chunk_count,
    (select coalesce(sum(size), 0) from messages where messages.thread = threads.thread) as size,
    threads.created_at,
    threads.updated_at
from threads
where threads.thread_id is not null;

-- For people: every thread, latest first.
create view overview as
select
    thread_id as thread,
    status,
    message_count as messages,
    chunk_count as chunks,
    size as bytes,
    datetime(created_at / 1000, 'unixepoch') as created,
    datetime(updated_at / 1000, 'unixepoch') as updated
from thread_summary
order by updated_at desc;

-- For people: every message with its text.
create view transcript as
select
    threads.thread_id as thread,
    messages.message_id as message,
    messages.status,
    messages.reason,
    datetime(messages.created_at / 1000, 'unixepoch') as created,
    datetime(messages.updated_at / 1000, 'unixepoch') as updated,
    (
        select group_concat(content, '')
        from (
            select content, seq from entries
            where entries.thread = messages.thread
              and entries.message = messages.message
              and entries.seq between messages.first_seq and messages.last_seq
              and entries.last >= messages.first_seq
              and entries.first <= messages.last_seq
            order by seq
        )
    ) as text
from messages
join threads on threads.thread = messages.thread
where threads.thread_id is not null
order by messages.thread, messages.message;

-- For people: every chunk and every end, in sequence.
create view sequence as
select
    threads.thread_id as thread,
    entries.seq,
    messages.message_id as message,
    strftime('%Y-%m-%d %H:%M:%f', entries.timestamp / 1000.0, 'unixepoch') as time,
    case when entries.content is null then 'complete' else entries.event end as event,
    case when entries.content is null then messages.status || coalesce(': ' || messages.reason, '') else entries.content end as content
from entries
join threads on threads.thread = entries.thread
join messages on messages.message = entries.message
where threads.thread_id is not null
order by entries.thread, entries.seq;
