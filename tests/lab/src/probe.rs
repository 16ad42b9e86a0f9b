//! Measures connectivity: ping, TCP and UDP echo, bulk transfer, a flow of numbered packets. Both families; every
//! operation has a deadline.
//!
//! Servers return to each client the source address that they observed, so that tests can check that it is unchanged.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt::RcvBufForce};
use sha2::{Digest, Sha256};

use crate::namespace::Namespace;

/// Receive timeout of servers, after which they check whether to stop.
const TICK: Duration = Duration::from_millis(100);
/// Receive buffer of a flow in bytes, for ten seconds of the fastest flow. The default holds about two hundred packets;
/// a stall of the receiving thread would be counted as packet loss.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Limit of packets that a flow's sender sends at once after a late wake-up. More might overflow a queue on the path.
const BURST: u32 = 100;

/// Sends one ICMP echo. Returns TTL or hop limit of the answer, or `None` without an answer within a second.
pub async fn ping(from: &Namespace, to: IpAddr) -> Result<Option<u8>> {
    ping_with(from, to, &[]).await
}

/// Sends one ICMP echo with options of `ping`, such as `-M do -s 1392`.
pub async fn ping_with(from: &Namespace, to: IpAddr, options: &[&str]) -> Result<Option<u8>> {
    let mut command = from.command("ping");
    command.args(["-n", "-c1", "-W1"]).args(options).arg(to.to_string()).env("LC_ALL", "C");
    let done = tokio::process::Command::from(command).output().await.context("start ping (iputils-ping)")?;
    let text = String::from_utf8_lossy(&done.stdout);
    match done.status.code() {
        Some(0) => {
            let ttl = text.split("ttl=").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
            Ok(Some(ttl.with_context(|| format!("the output of ping has no ttl: {text}"))?))
        }
        // No answer, an ICMP error, or no route: unreachable.
        Some(1 | 2) => Ok(None),
        _ => bail!("ping {to}: {}: {}", done.status, String::from_utf8_lossy(&done.stderr)),
    }
}

/// An echo server for TCP and UDP on one port of a namespace. Dropping it stops the server.
#[derive(Debug)]
pub struct Echo {
    /// Address and port of the server.
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Echo {
    /// Starts a server on `address` and a free port.
    pub fn start(at: &Namespace, address: IpAddr) -> Result<Self> {
        Self::on(at, SocketAddr::new(address, 0))
    }

    /// Starts a server on a given port (0: a free one).
    pub fn on(at: &Namespace, address: SocketAddr) -> Result<Self> {
        let bind = move || -> std::io::Result<_> {
            let tcp = TcpListener::bind(address)?;
            let udp = UdpSocket::bind(tcp.local_addr()?)?;
            Ok((tcp, udp))
        };
        let (tcp, udp) = at.within(bind)?.with_context(|| format!("listen on {address} in {}", at.name))?;
        let address = tcp.local_addr()?;
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(TICK))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_tcp, stop_udp) = (stop.clone(), stop.clone());
        let threads = vec![
            std::thread::spawn(move || serve_tcp(&tcp, &stop_tcp)),
            std::thread::spawn(move || serve_udp(&udp, &stop_udp)),
        ];
        Ok(Self { address, stop, threads })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve_tcp(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, source)) => {
                // One thread per client, so that a stalled client does not block others; its timeouts end it.
                std::thread::spawn(move || echo_stream(stream, source));
            }
            // accept has no timeout; this is the poll interval.
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn echo_stream(mut stream: TcpStream, source: SocketAddr) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    writeln!(stream, "{source}")?;
    let mut reader = stream.try_clone()?;
    std::io::copy(&mut reader, &mut stream)?;
    stream.shutdown(Shutdown::Write)
}

fn serve_udp(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = [0; 65536];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, source)) = socket.recv_from(&mut buffer) {
            let answer = [format!("{source}\n").as_bytes(), &buffer[..length]].concat();
            let _ = socket.send_to(&answer, source);
        }
    }
}

/// Sends `payload` to an [`Echo`] over a new TCP connection and checks the answer. Returns the source
/// that the server observed.
pub async fn tcp_echo(from: &Namespace, to: SocketAddr, payload: &[u8], within: Duration) -> Result<SocketAddr> {
    let payload = payload.to_vec();
    let exchange = move || -> Result<SocketAddr> {
        let mut stream = TcpStream::connect_timeout(&to, within)?;
        stream.set_read_timeout(Some(within))?;
        stream.set_write_timeout(Some(within))?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut seen = String::new();
        reader.read_line(&mut seen)?;
        stream.write_all(&payload)?;
        stream.shutdown(Shutdown::Write)?;
        let mut back = Vec::new();
        reader.read_to_end(&mut back)?;
        ensure!(back == payload, "{} bytes sent, {} different bytes came back", payload.len(), back.len());
        Ok(seen.trim().parse()?)
    };
    from.within_async(exchange).await?.with_context(|| format!("TCP from {} to {to}", from.name))
}

/// Sends one datagram to an [`Echo`] and checks the answer. Returns the source that the server observed.
pub async fn udp_echo(from: &Namespace, to: SocketAddr, payload: &[u8], within: Duration) -> Result<SocketAddr> {
    let payload = payload.to_vec();
    let exchange = move || -> Result<SocketAddr> {
        let socket = UdpSocket::bind(any(to))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(within))?;
        socket.send(&payload)?;
        let mut buffer = [0; 65536];
        let length = socket.recv(&mut buffer)?;
        let end =
            buffer[..length].iter().position(|byte| *byte == b'\n').context("the answer contains no source address")?;
        ensure!(buffer[end + 1..length] == payload, "a different payload came back");
        Ok(std::str::from_utf8(&buffer[..end])?.parse()?)
    };
    from.within_async(exchange).await?.with_context(|| format!("UDP from {} to {to}", from.name))
}

fn any(like: SocketAddr) -> SocketAddr {
    let address: IpAddr = if like.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    SocketAddr::new(address, 0)
}

/// Result of a bulk transfer.
#[derive(Clone, Debug)]
pub struct Bulk {
    /// Number of bytes received; their hash equals that of the bytes sent.
    pub bytes: u64,
    /// Time from connect to the last byte.
    pub elapsed: Duration,
    /// Source address that the receiver observed.
    pub source: SocketAddr,
}

impl Bulk {
    /// Returns the throughput in Mbit/s.
    pub fn mbit_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / 1e6 / self.elapsed.as_secs_f64()
    }
}

/// Sends `bytes` of pseudo-random data over one TCP connection. Fails unless they arrive unchanged within the deadline.
pub async fn bulk(from: &Namespace, to: &Namespace, address: IpAddr, bytes: u64, within: Duration) -> Result<Bulk> {
    let end = Instant::now() + within;
    let listener = to.within(move || TcpListener::bind((address, 0)))??;
    let target = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    let receiver = tokio::task::spawn_blocking(move || receive(&listener, end));
    let sender = from.within_async(move || send(target, bytes, end)).await;
    let sent = sender?.with_context(|| format!("send {bytes} bytes from {} to {target}", from.name));
    let received = receiver.await?.with_context(|| format!("receive at {target} from {}", from.name));
    // If both fail, the sender's error is the cause.
    let (started, sent) = sent?;
    let received = received?;
    ensure!(received.bytes == bytes, "{} of {bytes} bytes arrived", received.bytes);
    ensure!(received.hash == sent, "the {bytes} bytes received differ from those sent");
    Ok(Bulk { bytes, elapsed: received.ended - started, source: received.source })
}

type Hash = [u8; 32];

struct Received {
    bytes: u64,
    hash: Hash,
    source: SocketAddr,
    ended: Instant,
}

fn send(to: SocketAddr, bytes: u64, end: Instant) -> Result<(Instant, Hash)> {
    let started = Instant::now();
    let mut stream = TcpStream::connect_timeout(&to, left(end)?)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ bytes);
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 256 * 1024];
    let mut rest = bytes;
    while rest > 0 {
        let length = usize::try_from(rest.min(chunk.len() as u64))?;
        random.fill(&mut chunk[..length]);
        hash.update(&chunk[..length]);
        stream.set_write_timeout(Some(left(end)?))?;
        stream.write_all(&chunk[..length])?;
        rest -= length as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok((started, hash.finalize().into()))
}

fn receive(listener: &TcpListener, end: Instant) -> Result<Received> {
    let (mut stream, source) = loop {
        match listener.accept() {
            Ok(accepted) => break accepted,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                left(end)?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.into()),
        }
    };
    stream.set_nonblocking(false)?;
    let mut hash = Sha256::new();
    let mut bytes = 0;
    let mut chunk = vec![0; 256 * 1024];
    loop {
        stream.set_read_timeout(Some(left(end)?))?;
        let length = stream.read(&mut chunk).with_context(|| format!("after {bytes} bytes"))?;
        if length == 0 {
            return Ok(Received { bytes, hash: hash.finalize().into(), source, ended: Instant::now() });
        }
        hash.update(&chunk[..length]);
        bytes += length as u64;
    }
}

fn left(end: Instant) -> Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(anyhow!("the deadline has passed")) } else { Ok(left) }
}

/// A xorshift64* generator: incompressible data that is the same in every run.
struct Random(u64);

impl Random {
    fn fill(&mut self, buffer: &mut [u8]) {
        for piece in buffer.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let bytes = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_ne_bytes();
            piece.copy_from_slice(&bytes[..piece.len()]);
        }
    }
}

/// Sends runs of datagrams, each run in one system call with segmentation offload (`UDP_SEGMENT`), as QUIC does, so that
/// aggregates of UDP cross the path. Fails unless all arrive unchanged and in their order.
pub async fn udp_runs(from: &Namespace, to: &Namespace, address: IpAddr, length: u16, runs: u32) -> Result<String> {
    // The last datagram of each run is shorter.
    const PER_RUN: usize = 20;
    let receiver = to.within(move || UdpSocket::bind((address, 0)))??;
    setsockopt(&receiver, RcvBufForce, &RECEIVE_BUFFER).context("enlarge the receive buffer")?;
    receiver.set_read_timeout(Some(Duration::from_secs(5)))?;
    let target = receiver.local_addr()?;
    let sender = from.within(move || UdpSocket::bind(any(target)))??;
    sender.connect(target)?;
    let bytes = usize::from(length) * PER_RUN - usize::from(length) / 2;
    tokio::task::spawn_blocking(move || {
        let (mut random, mut run, mut buffer) = (Random(0x5eed), vec![0; bytes], [0; 2048]);
        for number in 0..runs {
            random.fill(&mut run);
            let sent = sendmsg::<SockaddrStorage>(
                sender.as_raw_fd(),
                &[IoSlice::new(&run)],
                &[ControlMessage::UdpGsoSegments(&length)],
                MsgFlags::empty(),
                None,
            );
            ensure!(sent.context("send a run")? == bytes, "a run was sent in part");
            for (place, expected) in run.chunks(usize::from(length)).enumerate() {
                let received = receiver.recv(&mut buffer);
                let received = received.with_context(|| format!("datagram {place} of run {number} did not arrive"))?;
                ensure!(&buffer[..received] == expected, "datagram {place} of run {number} has other bytes");
            }
        }
        Ok(format!("{runs} runs of {PER_RUN} datagrams"))
    })
    .await?
}

/// A running flow of numbered datagrams at a constant rate.
#[derive(Debug)]
pub struct Flow {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Arrived>,
    done: Arc<AtomicBool>,
}

/// Result of a [`Flow`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowReport {
    /// Number of datagrams sent.
    pub sent: u64,
    /// Number of distinct datagrams received.
    pub received: u64,
    /// Number of datagrams sent but not received.
    pub lost: u64,
    /// Number of copies beyond the first.
    pub duplicated: u64,
    /// Number of datagrams that arrived after one with a higher number.
    pub reordered: u64,
    /// Longest time between two arrivals.
    pub longest_gap: Duration,
}

#[derive(Debug, Default)]
struct Arrived {
    numbers: HashSet<u64>,
    duplicated: u64,
    reordered: u64,
    longest_gap: Duration,
}

impl Flow {
    /// Starts sending `per_second` datagrams from one namespace to an address of another.
    pub fn start(from: &Namespace, to: &Namespace, address: IpAddr, per_second: u32) -> Result<Self> {
        ensure!(per_second > 0, "a flow needs a rate");
        let socket = to.within(move || UdpSocket::bind((address, 0)))??;
        setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER).context("enlarge the flow's receive buffer")?;
        let target = socket.local_addr()?;
        socket.set_read_timeout(Some(TICK))?;
        let out = from.within(move || -> std::io::Result<_> {
            let out = UdpSocket::bind(any(target))?;
            out.connect(target)?;
            Ok(out)
        })??;
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicBool::new(false));
        let (stop_sender, done_receiver) = (stop.clone(), done.clone());
        let receiver = std::thread::spawn(move || collect(&socket, &done_receiver));
        let sender = std::thread::spawn(move || pace(&out, per_second, &stop_sender));
        Ok(Self { stop, sender, receiver, done })
    }

    /// Stops the sender, waits until no more datagrams arrive, and returns the counts.
    pub async fn stop(self) -> Result<FlowReport> {
        tokio::task::spawn_blocking(move || {
            self.stop.store(true, Ordering::Relaxed);
            let sent = self.sender.join().map_err(|_| anyhow!("the sender panicked"))??;
            self.done.store(true, Ordering::Relaxed);
            let arrived = self.receiver.join().map_err(|_| anyhow!("the receiver panicked"))?;
            let received = arrived.numbers.len() as u64;
            let Arrived { duplicated, reordered, longest_gap, .. } = arrived;
            Ok(FlowReport { sent, received, lost: sent - received, duplicated, reordered, longest_gap })
        })
        .await?
    }
}

fn pace(socket: &UdpSocket, per_second: u32, stop: &AtomicBool) -> Result<u64> {
    let mut start = Instant::now();
    let mut payload = [0; 64];
    let mut sent = 0_u64;
    let arrears = Duration::from_secs_f64(f64::from(BURST) / f64::from(per_second));
    while !stop.load(Ordering::Relaxed) {
        // Paced by the clock: after a late wake-up, at most one burst is sent to catch up. The rest is skipped.
        let due = start + Duration::from_secs_f64(sent as f64 / f64::from(per_second));
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        start += due.elapsed().saturating_sub(arrears);
        payload[..8].copy_from_slice(&sent.to_be_bytes());
        // A send error (no route, an ICMP error of an earlier datagram) counts as loss, like a drop on the path.
        let _ = socket.send(&payload);
        sent += 1;
    }
    Ok(sent)
}

fn collect(socket: &UdpSocket, done: &AtomicBool) -> Arrived {
    // Longer than a busy machine may delay the last packets.
    const QUIET: Duration = Duration::from_secs(2);
    let mut arrived = Arrived::default();
    let (mut highest, mut last) = (0, None::<Instant>);
    let mut buffer = [0; 2048];
    let mut quiet_since = None::<Instant>;
    loop {
        let number = socket.recv(&mut buffer).ok().filter(|length| *length >= 8);
        let Some(number) = number.and_then(|_| buffer[..8].try_into().ok()).map(u64::from_be_bytes) else {
            let since = *quiet_since.get_or_insert_with(Instant::now);
            if done.load(Ordering::Relaxed) && since.elapsed() >= QUIET {
                return arrived;
            }
            continue;
        };
        quiet_since = None;
        let now = Instant::now();
        arrived.longest_gap = arrived.longest_gap.max(last.map_or(Duration::ZERO, |last| now - last));
        last = Some(now);
        if !arrived.numbers.insert(number) {
            arrived.duplicated += 1;
        } else if number < highest {
            arrived.reordered += 1;
        }
        highest = highest.max(number);
    }
}
