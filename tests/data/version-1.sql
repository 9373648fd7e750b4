-- resume-stream keeps its threads here. Look inside while the service runs:
--
--   sqlite3 -readonly resume-stream.db 'select * from transcript'
--
-- Times are milliseconds since 1970 (UTC); the views show them as dates.

pragma application_id = 0x72737472; -- "rstr"
pragma user_version = 1;

-- One row. A thread's generation is drawn from here, so that it is higher than
-- every earlier one, whatever the clock does and whatever was deleted.
create table clock (
    latest_generation integer not null
) strict;

insert into clock values (0);

create table threads (
    thread      integer primary key autoincrement, -- never used twice
    thread_id   text unique,                       -- null: cleared, and being erased
    generation  integer not null,
    last_seq    integer not null default 0,
    created_at  integer not null,
    updated_at  integer not null
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
    last_seq    integer,                           -- once it has ended: the place of its end
    created_at  integer not null,
    updated_at  integer not null,
    unique (thread, message_id)
) strict;

create index active_messages on messages (thread) where status = 'active';

create table chunks (
    thread      integer not null references threads,
    seq         integer not null,
    message     integer not null references messages,
    event       text,
    content     text,                              -- null: here the message ends
    timestamp   integer not null,
    primary key (thread, seq)
) strict, without rowid;

-- Deleting a thread deletes all of it. (Foreign keys would do this only where
-- they are switched on, which in the sqlite3 shell they are not.)
create trigger thread_is_deleted after delete on threads
begin
    delete from chunks where thread = old.thread;
    delete from messages where thread = old.thread;
end;

-- The end of a message takes a place in the sequence, whoever ends it.
create trigger message_ends after update of status on messages
when old.status = 'active' and new.status <> 'active'
begin
    update threads
    set last_seq = last_seq + 1,
        updated_at = cast((julianday('now') - 2440587.5) * 86400000 as integer)
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

-- What a thread amounts to: active while any of its messages is, otherwise as
-- the message that ended last.
create view thread_summary as
select
    threads.thread,
    threads.thread_id,
    threads.generation,
    threads.last_seq,
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

-- For people: every thread, the one touched last first.
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
            select content from chunks
            where chunks.thread = messages.thread
              and chunks.message = messages.message
              and chunks.seq between messages.first_seq and messages.last_seq
            order by chunks.seq
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
    chunks.seq,
    messages.message_id as message,
    strftime('%Y-%m-%d %H:%M:%f', chunks.timestamp / 1000.0, 'unixepoch') as time,
    case when chunks.content is null then 'complete' else chunks.event end as event,
    case when chunks.content is null then messages.status || coalesce(': ' || messages.reason, '') else chunks.content end as content
from chunks
join threads on threads.thread = chunks.thread
join messages on messages.message = chunks.message
where threads.thread_id is not null
order by chunks.thread, chunks.seq;
