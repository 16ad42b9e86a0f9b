//! Flow control and stream limits of HTTP/2: one stalled, idle or reset stream does not affect
//! others (docs/design.md, "HTTP/2").

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout},
};

use super::{
    super::{
        connections::{Error, Opened},
        limits,
    },
    SOON,
    sites::Sites,
};

/// Serves each stream of node x2 by `serve`.
async fn node<F, Fut>(sites: &Sites, serve: F)
where
    F: Fn(TcpStream, usize) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = sites.listen();
    tokio::spawn(async move {
        let mut number = 0;
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(serve(client, number));
            number += 1;
        }
    });
}

/// Writes without end, and counts the written bytes.
async fn flood(mut client: TcpStream, sent: Arc<AtomicU64>) {
    let block = vec![7; 64 << 10];
    while client.write_all(&block).await.is_ok() {
        sent.fetch_add(block.len() as u64, Ordering::Relaxed);
    }
}

/// Echoes all bytes.
async fn echo(mut client: TcpStream) {
    let (mut read, mut write) = client.split();
    let _ = tokio::io::copy(&mut read, &mut write).await;
}

/// A counter that does not change for this long has stopped. Longer than the pauses of a busy machine.
const QUIET: Duration = Duration::from_secs(2);

/// Waits until a counter exceeds `least` and does not change for `quiet`.
async fn still(counter: &AtomicU64, least: u64, quiet: Duration) -> u64 {
    let mut last = (counter.load(Ordering::Relaxed), Instant::now());
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = counter.load(Ordering::Relaxed);
        if now != last.0 {
            last = (now, Instant::now());
        } else if now > least && last.1.elapsed() > quiet {
            return now;
        }
    }
}

/// Opens `count` streams, a hundred at a time: the node's listen queue holds 1,024 connections, and one core must
/// answer each stream within [`limits::CONNECT`] and [`limits::ATTEMPT`].
async fn open(sites: &Sites, count: usize) -> Vec<Result<Opened, Error>> {
    let mut open = Vec::new();
    while open.len() < count {
        let next = (count - open.len()).min(100);
        open.extend(futures::future::join_all((0..next).map(|_| sites.open("x2"))).await);
    }
    open
}

/// Duration of one request and response on a new stream.
async fn request(sites: &Sites) -> Duration {
    let start = Instant::now();
    let mut stream = sites.open("x2").await.expect("a stream");
    stream.write_all(b"ping").await.expect("sent");
    let mut answer = [0; 4];
    timeout(SOON, stream.read_exact(&mut answer)).await.expect("in time").expect("answered");
    start.elapsed()
}

/// A stalled reader stops its sender, and unread data is bounded.
#[tokio::test(flavor = "multi_thread")]
async fn stalled_reader_stops_its_sender() {
    let sites = Sites::start().await;
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    node(&sites, move |client, _| flood(client, counter.clone())).await;
    let mut stream = sites.open("x2").await.expect("a stream");
    let taken = timeout(SOON * 3, still(&sent, 0, QUIET)).await.expect("the sender stops");
    // The stream window, the send buffer and the buffers of two loopback sockets.
    assert!(taken < 32 << 20, "{taken} bytes were accepted from the sender");
    // The stream continues when the reader reads.
    let mut block = vec![0; 1 << 20];
    timeout(SOON, stream.read_exact(&mut block)).await.expect("in time").expect("the stream continues");
    assert!(block.iter().all(|byte| *byte == 7));
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_streams_do_not_block_others() {
    let sites = Sites::start().await;
    node(&sites, |client, _| echo(client)).await;
    let mut idle = Vec::new();
    for _ in 0..500 {
        let mut stream = sites.open("x2").await.expect("a stream");
        stream.write_all(b"x").await.expect("sent");
        idle.push(stream);
    }
    let stream = sites.open("x2").await.expect("a stream");
    let (mut read, mut write) = tokio::io::split(stream);
    const BULK: usize = 16 << 20;
    let sender = tokio::spawn(async move {
        let block = vec![3; 64 << 10];
        for _ in 0..BULK / block.len() {
            write.write_all(&block).await.expect("sent");
        }
        write.shutdown().await.expect("ended");
    });
    let mut back = Vec::new();
    timeout(SOON * 3, read.read_to_end(&mut back)).await.expect("in time").expect("all of it");
    sender.await.expect("sent");
    assert_eq!(back.len(), BULK);
    for mut stream in idle {
        let mut byte = [0];
        timeout(SOON, stream.read_exact(&mut byte)).await.expect("in time").expect("still there");
    }
}

/// At the edge's limit of streams, new ones are refused until others have ended.
#[tokio::test(flavor = "multi_thread")]
async fn streams_above_the_limit_are_refused_and_block_no_others() {
    let sites = Sites::start().await;
    node(&sites, |client, _| echo(client)).await;
    let most = (limits::STREAMS as usize - 1) * limits::CONNECTIONS;
    let mut open: Vec<Opened> =
        open(&sites, most).await.into_iter().map(|stream| stream.expect("below the limit")).collect();
    let refused = timeout(limits::OPEN * 2, sites.open("x2")).await.expect("refused in time");
    assert!(refused.is_err(), "above the limit");
    open.truncate(most / 2);
    request(&sites).await;
}

/// A pod that takes all streams it can get leaves some for others.
#[tokio::test(flavor = "multi_thread")]
async fn greedy_client_leaves_streams_for_others() {
    let sites = Sites::start().await;
    node(&sites, |client, _| echo(client)).await;
    let greedy = [10, 9, 9, 9];
    let mut open = Vec::new();
    let refused = loop {
        match timeout(SOON, sites.open_as(greedy, "x2")).await.expect("in time") {
            Ok(stream) => open.push(stream),
            Err(refused) => break refused.to_string(),
        }
    };
    let most = (limits::STREAMS as usize - 1) * limits::CONNECTIONS;
    assert!((most / 2..most).contains(&open.len()), "{} streams", open.len());
    assert!(refused.contains("client 10.9.9.9 has its share"), "{refused}");
    request(&sites).await;
    open.truncate(most / 4);
    timeout(SOON, sites.open_as(greedy, "x2")).await.expect("in time").expect("it has given some back");
}

/// h2 closes a connection after too many resets by default.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_resets_close_no_connection() {
    let sites = Sites::start().await;
    let served = Arc::new(AtomicUsize::new(0));
    let counter = served.clone();
    node(&sites, move |client, _| {
        let number = counter.fetch_add(1, Ordering::Relaxed);
        async move {
            if number.is_multiple_of(2) {
                // RST instead of FIN, as from a killed kubelet.
                let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
            } else {
                echo(client).await;
            }
        }
    })
    .await;
    let before = sites.numbers();
    for _ in 0..30 {
        let streams = futures::future::join_all((0..100).map(|_| sites.open("x2"))).await;
        for stream in streams {
            // Dropped without data, so it is reset from this side. The node's reset may arrive first.
            if let Err(e) = stream {
                assert!(e.to_string().contains("reset by peer"), "{e}");
            }
        }
    }
    // Requests that are dropped before the response.
    for _ in 0..2000 {
        let _ = timeout(Duration::from_micros(50), sites.open("x2")).await;
    }
    assert_eq!(sites.numbers(), before, "the same connections as before");
}

/// h2 limits unread small frames, which `exec` and `logs -f` send in large numbers.
#[tokio::test(flavor = "multi_thread")]
async fn unread_small_frames_close_no_connection() {
    let sites = Sites::start().await;
    const FRAMES: usize = 20_000;
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    node(&sites, move |mut client, _| {
        let counter = counter.clone();
        async move {
            let _ = client.set_nodelay(true);
            for _ in 0..FRAMES {
                if client.write_all(b"k").await.is_err() {
                    return;
                }
                counter.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        }
    })
    .await;
    let before = sites.numbers();
    let mut stream = sites.open("x2").await.expect("a stream");
    super::sites::eventually("all of it is sent", || sent.load(Ordering::Relaxed) == FRAMES as u64).await;
    let mut all = Vec::new();
    timeout(SOON, stream.read_to_end(&mut all)).await.expect("in time").expect("all of it");
    assert_eq!(all.len(), FRAMES);
    assert_eq!(sites.numbers(), before, "the same connections as before");
}

/// Stalled readers use up only their own windows.
#[tokio::test(flavor = "multi_thread")]
async fn stalled_readers_do_not_delay_others() {
    let sites = Sites::start().await;
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    node(&sites, move |client, number| {
        let counter = counter.clone();
        async move { if number < 40 { flood(client, counter).await } else { echo(client).await } }
    })
    .await;
    let mut stalled = Vec::new();
    for _ in 0..40 {
        stalled.push(sites.open("x2").await.expect("a stream"));
    }
    timeout(SOON * 3, still(&sent, 0, QUIET)).await.expect("all forty senders stop");
    let slowest = futures::future::join_all((0..20).map(|_| request(&sites))).await.into_iter().max().expect("some");
    assert!(slowest < Duration::from_secs(3), "a request took {slowest:?} beside stalled readers");
}

/// The connection window is restored when a stalled stream ends. In total more than the whole window is used here, in
/// parts, so a leak would stop the connection. (No library reports how full the window is.)
#[tokio::test(flavor = "multi_thread")]
async fn window_of_ended_streams_is_restored() {
    const READERS: usize = 500;
    let sites = Sites::start().await;
    let before = sites.numbers();
    let (sent, echoing) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (counter, echoes) = (sent.clone(), echoing.clone());
    node(&sites, move |client, _| {
        let (counter, echoes) = (counter.clone(), echoes.load(Ordering::Relaxed));
        async move { if echoes { echo(client).await } else { flood(client, counter).await } }
    })
    .await;
    // Per connection.
    let held = u64::from(limits::STREAM_WINDOW) * READERS as u64;
    for _ in 0..=limits::CONNECTIONS as u64 * u64::from(limits::CONNECTION_WINDOW) / held {
        sent.store(0, Ordering::Relaxed);
        // While the open ones flood.
        let stalled = open(&sites, READERS).await;
        assert!(stalled.iter().all(Result::is_ok));
        // All that the windows allow, and the content of the sockets.
        let full = timeout(SOON * 6, still(&sent, held, Duration::from_millis(500))).await;
        assert!(full.is_ok(), "{} bytes were sent, {held} are expected", sent.load(Ordering::Relaxed));
    }
    super::sites::eventually("streams end", || sites.edge_stats.open_streams() == 0).await;
    echoing.store(true, Ordering::Relaxed);
    assert!(request(&sites).await < Duration::from_secs(3));
    assert_eq!(sites.numbers(), before, "the same connections as before");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_short_requests_succeed() {
    let sites = Sites::start().await;
    node(&sites, |client, _| echo(client)).await;
    let before = sites.numbers();
    for _ in 0..100 {
        futures::future::join_all((0..100).map(|_| request(&sites))).await;
    }
    assert_eq!(sites.numbers(), before);
}

/// A thousand `logs -f` and one unread stream: the others keep their rate, and memory stays bounded.
#[tokio::test(flavor = "multi_thread")]
async fn thousand_logs_flow_beside_an_unread_stream() {
    const LOGS: usize = 1000;
    const LINES: usize = 5;
    const EVERY: Duration = Duration::from_secs(1);
    let sites = Sites::start().await;
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    node(&sites, move |mut client, number| {
        let counter = counter.clone();
        async move {
            if number == 0 {
                return flood(client, counter).await;
            }
            let mut period = tokio::time::interval(EVERY);
            for line in 0..LINES {
                period.tick().await;
                if client.write_all(format!("line {line}\n").as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    let unread = sites.open("x2").await.expect("a stream");
    timeout(SOON * 3, still(&sent, 0, QUIET)).await.expect("its sender stops");
    let logs = open(&sites, LOGS).await.into_iter().map(|log| async {
        let mut log = log.expect("a stream");
        let (begin, mut text) = (Instant::now(), String::new());
        timeout(SOON * 3, log.read_to_string(&mut text)).await.expect("in time").expect("all of it");
        assert_eq!(text.lines().count(), LINES);
        begin.elapsed()
    });
    let logs = futures::future::join_all(logs).await;
    let slowest = logs.into_iter().max().expect("some");
    let written = EVERY * u32::try_from(LINES).expect("a small number");
    println!(
        "{LOGS} logs of {written:?}: the slowest took {slowest:?}; {} bytes were accepted for the unread stream",
        sent.load(Ordering::Relaxed)
    );
    assert!(slowest < written * 4, "{slowest:?}");
    assert!(sent.load(Ordering::Relaxed) < 32 << 20, "its sender stays stopped");
    drop(unread);
}
