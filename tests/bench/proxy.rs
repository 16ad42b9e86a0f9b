//! `bench proxy`: proxy streams against a direct TCP connection between the same two nodes (the site's router maps a
//! port for it, which real sites do not), and against konnectivity if its programs are on PATH. Links: as fast as this
//! machine copies, 1 Gbit/s, and a bad one. Variants alternate within a run; the median counts.
//!
//! A proxy stream is opened by address on the cloud gateway node: eBPF program, proxy, HTTP/2 over TLS, the site's
//! NAT, its gateway node, the node. Konnectivity: an HTTP CONNECT by a local socket to its server on the same
//! node, its agent on the same gateway node of the site. All ends share this machine's cores, so the comparison
//! shows the cost per byte.
//!
//! Direct is one TCP connection, whereas any proxy uses three in a row. The cost of that alone is measured too: two
//! relays in place of the gateway nodes that only move bytes within the kernel (splice), without TLS, multiplexing and
//! authentication. That is the upper bound for any proxy.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets::ASCII_MARKDOWN};
use raven_tests::{Lab, Namespace, PoolSpec, Protocol, eventually, process::memory_mb};
use serde_json::{Value, json};

use crate::{
    konnectivity::{self, Konnectivity},
    median,
};

/// Port of the node's server.
const PORT: u16 = 10255;
/// Port of the site's router that is mapped directly to the node.
const DIRECT: u16 = 20255;
/// Port of the relays.
const RELAYED: u16 = 20256;
/// Number of idle streams.
const IDLE: usize = 1000;
const ANSWER: Duration = Duration::from_secs(60);

/// A link, and the amount of data to send over it.
struct Link {
    name: &'static str,
    /// Delay per direction, and the number of frames of which one is lost.
    bad: Option<(Duration, u64)>,
    /// Bytes per measurement of throughput.
    bulk: u64,
    /// Number of concurrent streams of that measurement.
    streams: u64,
    /// Number of small requests per measurement of latency.
    requests: usize,
}

const GOOD: Link = Link { name: "good", bad: None, bulk: 400_000_000, streams: 100, requests: 300 };
/// The link of a site with a fast internet connection.
const GIGABIT: Link = Link { name: "1 Gbit/s", ..GOOD };
const BAD: Link = Link {
    name: "50 ms, 1 % lost",
    bad: Some((Duration::from_millis(25), 100)),
    bulk: 3_000_000,
    streams: 20,
    requests: 60,
};

/// Runs the benchmark.
pub(crate) fn run(runs: usize, json: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let seen = runtime.block_on(measure(runs))?;
    let konnectivity = seen.good.contains_key(KONNECTIVITY);
    if !konnectivity {
        eprintln!("konnectivity is skipped: proxy-server and proxy-agent are not both on PATH");
    }
    if json {
        println!("{}", seen.json());
        return Ok(());
    }
    let mut table = Table::new();
    let variants: Vec<&str> =
        [RAVEN, KONNECTIVITY, RELAYS].into_iter().filter(|name| seen.good.contains_key(name)).collect();
    table.load_style(ASCII_MARKDOWN).set_header(["link", "value"].into_iter().chain(variants.iter().copied()));
    let ratio = |value: f64| format!("{value:.2}");
    let ms = |value: f64| format!("{value:.2} ms");
    for (link, seen) in [(&GOOD, &seen.good), (&GIGABIT, &seen.gigabit), (&BAD, &seen.bad)] {
        let mut row = |what: String, cell: &dyn Fn(&Seen) -> String| {
            let cells = variants.iter().filter_map(|name| seen.get(name)).map(cell);
            table.add_row([link.name.to_owned(), what].into_iter().chain(cells));
        };
        row("one stream, throughput × direct".to_owned(), &|s| ratio(s.one));
        row("one stream, bytes per CPU-second × direct".to_owned(), &|s| ratio(s.per_cpu));
        row(format!("{} streams, throughput × direct", link.streams), &|s| ratio(s.many));
        row("small request, added, p50".to_owned(), &|s| ms(s.added[0]));
        row("small request, added, p99".to_owned(), &|s| ms(s.added[1]));
        if seen.values().any(|s| s.idle > 0.0) {
            row("memory of an idle stream on both ends".to_owned(), &|s| {
                if s.idle > 0.0 { format!("{:.0} bytes", s.idle) } else { String::new() }
            });
        }
    }
    println!("{table}");
    Ok(())
}

const RAVEN: &str = "Raven";
const KONNECTIVITY: &str = "konnectivity";
const RELAYS: &str = "two bare relays";

/// Results of one variant, relative to a direct connection on the same link.
#[derive(Clone, Default)]
struct Seen {
    one: f64,
    per_cpu: f64,
    many: f64,
    /// Added latency in ms: p50 and p99.
    added: [f64; 2],
    /// Memory of an idle stream in bytes; measured on one link only.
    idle: f64,
}

struct Measured {
    good: BTreeMap<&'static str, Seen>,
    gigabit: BTreeMap<&'static str, Seen>,
    bad: BTreeMap<&'static str, Seen>,
}

impl Measured {
    fn json(&self) -> Value {
        let of = |name: &str| -> Value {
            let Some(good) = self.good.get(name) else { return Value::Null };
            let mut object = fields(good);
            object["bytes_per_idle_stream"] = json!(good.idle.round());
            object["gigabit_link"] = self.gigabit.get(name).map_or(Value::Null, fields);
            object["bad_link"] = self.bad.get(name).map_or(Value::Null, fields);
            object
        };
        let mut object = of(RAVEN);
        object["konnectivity"] = of(KONNECTIVITY);
        object["bare_relays"] = of(RELAYS);
        object
    }
}

fn fields(seen: &Seen) -> Value {
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    json!({
        "direct_ratio": round(seen.one), "direct_ratio_many_streams": round(seen.many), "direct_ratio_per_cpu_second": round(seen.per_cpu),
        "latency_added_ms_p50": round(seen.added[0]), "latency_added_ms_p99": round(seen.added[1]),
    })
}

/// How connections to the node are opened.
#[derive(Clone, Debug)]
enum Transport {
    Tcp(SocketAddr),
    Konnectivity(konnectivity::Connector),
}

async fn measure(runs: usize) -> Result<Measured> {
    ensure!(runs > 0, "--runs must be at least 1");
    let mut pools = PoolSpec::three();
    let mut direct = pools[1].forward(Protocol::Tcp, PORT, 1);
    direct.public_port = DIRECT;
    pools[1].forwards.push(direct);
    let relayed = pools[1].forward(Protocol::Tcp, RELAYED, 0);
    pools[1].forwards.push(relayed);
    let server = pools[0].forward(Protocol::Tcp, konnectivity::AGENT_PORT, 0);
    pools[0].forwards.push(server);
    let lab = Lab::builder().pools(pools).up().await?;
    // Cubic is the default of distributions' kernels. This machine may have another default, which namespaces inherit.
    fs::write("/proc/sys/net/ipv4/tcp_allowed_congestion_control", "reno cubic bbr")?;
    for ns in lab.site().namespaces() {
        ns.sh("echo cubic > /proc/sys/net/ipv4/tcp_congestion_control")?;
    }
    lab.cluster().apply_gateways(lab.site()).await?;
    let _controller = lab.start_controller().await?;
    let mut agents = lab.start_agents().await?;
    for agent in &mut agents {
        // Without XDP on the uplinks. It is free on a network card, but with it a veth copies every packet and
        // aggregates none, which would affect all variants.
        agent.arguments.extend(["--tier".to_owned(), "tc".to_owned()]);
        agent.restart()?;
    }
    serve(&lab.node("x-b").ns)?;
    let target = SocketAddr::from((lab.node("x-b").lan_v4, PORT));
    let konnectivity = Konnectivity::start(&lab, "cloud-a", "x-a")?;
    let pid = |node: &str| {
        agents.iter().find(|a| a.node.name == node).map(|a| a.process.pid()).context("the node has no agent")
    };
    let mut variants = vec![(RAVEN, Transport::Tcp(target), vec![pid("cloud-a")?, pid("x-a")?])];
    variants
        .extend(konnectivity.as_ref().map(|k| (KONNECTIVITY, Transport::Konnectivity(k.connector(target)), k.pids())));
    let site = lab.pool("edge-x").public_v4;
    relay(&lab.node("x-a").ns, target)?;
    relay(&lab.node("cloud-a").ns, (site, RELAYED).into())?;
    variants.push((RELAYS, Transport::Tcp(([127, 0, 0, 1], RELAYED).into()), Vec::new()));
    let direct = Transport::Tcp((site, DIRECT).into());
    let client = lab.node("cloud-a").ns.clone();
    for transport in variants.iter().map(|(_, transport, _)| transport).chain([&direct]) {
        let answers = || async { within(&client, transport, |transport| request(&transport).map(drop)).await };
        eventually(ANSWER, &format!("{transport:?} responds"), answers).await?;
    }
    let mut good = compare(&client, &variants, &direct, &GOOD, runs).await?;
    for (name, transport, pids) in variants.iter().filter(|(_, _, pids)| !pids.is_empty()) {
        let idle = idle(&client, transport, pids).await?;
        good.entry(name).or_default().idle = idle;
    }
    let router = &lab.pool("edge-x").router;
    router.sh("tc qdisc add dev wan root tbf rate 1gbit burst 256kb latency 10ms")?;
    let gigabit = compare(&client, &variants, &direct, &GIGABIT, runs).await?;
    router.sh("tc qdisc del dev wan root")?;
    let (delay, one_in) = BAD.bad.context("the bad link has no delay")?;
    let _impaired = lab.impair("edge-x", delay, one_in)?;
    let bad = compare(&client, &variants, &direct, &BAD, runs).await?;
    Ok(Measured { good, gigabit, bad })
}

/// Measures all variants and the direct connection alternately.
async fn compare(
    client: &Namespace,
    variants: &[(&'static str, Transport, Vec<u32>)],
    direct: &Transport,
    link: &'static Link,
    runs: usize,
) -> Result<BTreeMap<&'static str, Seen>> {
    let mut raw: BTreeMap<&str, Raw> = BTreeMap::new();
    for _ in 0..runs {
        for (name, transport) in
            variants.iter().map(|(name, transport, _)| (*name, transport)).chain([("direct", direct)])
        {
            let raw = raw.entry(name).or_default();
            let busy = busy_seconds()?;
            raw.one.push(within(client, transport, |transport| download(&transport, link.bulk, 1)).await?);
            raw.per_cpu.push(link.bulk as f64 / (busy_seconds()? - busy).max(0.01));
            raw.many.push(within(client, transport, |transport| download(&transport, link.bulk, link.streams)).await?);
            raw.latency.push(within(client, transport, |transport| percentiles(&transport, link.requests)).await?);
        }
    }
    let direct = raw.remove("direct").context("the direct connection was not measured")?;
    let against = |raw: &Raw| Seen {
        one: median(&raw.one) / median(&direct.one),
        per_cpu: median(&raw.per_cpu) / median(&direct.per_cpu),
        many: median(&raw.many) / median(&direct.many),
        added: [0, 1].map(|n| percentile(&raw.latency, n) - percentile(&direct.latency, n)),
        idle: 0.0,
    };
    Ok(variants.iter().map(|(name, _, _)| (*name, against(&raw[name]))).collect())
}

/// Measured values, one per run.
#[derive(Default)]
struct Raw {
    one: Vec<f64>,
    per_cpu: Vec<f64>,
    many: Vec<f64>,
    latency: Vec<[f64; 2]>,
}

fn percentile(latency: &[[f64; 2]], n: usize) -> f64 {
    median(&latency.iter().map(|p| p[n]).collect::<Vec<_>>())
}

/// Returns the memory in bytes that both ends use for an idle stream.
async fn idle(client: &Namespace, transport: &Transport, pids: &[u32]) -> Result<f64> {
    let resident = || pids.iter().map(|pid| memory_mb(*pid, "VmRSS")).sum::<Result<f64>>();
    let before = resident()?;
    let held =
        within(client, transport, |transport| (0..IDLE).map(|_| request(&transport)).collect::<Result<Vec<_>>>())
            .await?;
    let after = resident()?;
    drop(held);
    Ok((after - before) * 1024.0 * 1024.0 / IDLE as f64)
}

async fn within<T: Send + 'static>(
    ns: &Namespace,
    transport: &Transport,
    work: impl FnOnce(Transport) -> Result<T> + Send + 'static,
) -> Result<T> {
    let transport = transport.clone();
    ns.within_async(move || work(transport)).await?
}

/// Starts the node's server: it answers a number (8 bytes, big-endian) with as many bytes, and 0 with one byte.
/// The connection stays open.
fn serve(ns: &Namespace) -> Result<()> {
    let listener = ns.within(|| TcpListener::bind(("0.0.0.0", PORT)))??;
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || answer(client));
        }
    });
    Ok(())
}

fn answer(mut client: TcpStream) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let block = vec![7; 256 << 10];
    let mut wanted = [0; 8];
    loop {
        client.read_exact(&mut wanted)?;
        let mut left = usize::try_from(u64::from_be_bytes(wanted)).unwrap_or(0);
        if left == 0 {
            client.write_all(b"!")?;
        }
        while left > 0 {
            let n = left.min(block.len());
            client.write_all(&block[..n])?;
            left -= n;
        }
    }
}

/// Starts a relay between its port and `to`. The standard library moves bytes between sockets by splice(2).
fn relay(ns: &Namespace, to: SocketAddr) -> Result<()> {
    let listener = ns.within(|| TcpListener::bind(("0.0.0.0", RELAYED)))??;
    let connect = move |client: TcpStream| -> std::io::Result<()> {
        let node = TcpStream::connect_timeout(&to, ANSWER)?;
        client.set_nodelay(true)?;
        node.set_nodelay(true)?;
        let (mut from, mut back) = (client.try_clone()?, node.try_clone()?);
        std::thread::spawn(move || std::io::copy(&mut from, &mut back).and_then(|_| back.shutdown(Shutdown::Write)));
        std::io::copy(&mut &node, &mut &client)?;
        client.shutdown(Shutdown::Write)
    };
    ns.within(move || {
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A thread inherits the network namespace of the thread that created it.
                std::thread::spawn(move || connect(client));
            }
        });
    })
}

/// A connection to the node.
trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

fn connect(transport: &Transport) -> Result<Box<dyn Stream>> {
    match transport {
        Transport::Tcp(to) => {
            let stream = TcpStream::connect_timeout(to, ANSWER)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(ANSWER))?;
            Ok(Box::new(stream))
        }
        Transport::Konnectivity(connector) => Ok(Box::new(connector.connect(ANSWER)?)),
    }
}

/// Sends a small request on a new connection and returns the connection, still open.
fn request(transport: &Transport) -> Result<Box<dyn Stream>> {
    let mut stream = connect(transport)?;
    stream.write_all(&0u64.to_be_bytes())?;
    let mut byte = [0];
    stream.read_exact(&mut byte).with_context(|| format!("read the answer by {transport:?}"))?;
    Ok(stream)
}

/// Returns the throughput of concurrent streams in bytes per second.
fn download(transport: &Transport, bulk: u64, streams: u64) -> Result<f64> {
    let begin = Instant::now();
    let each = bulk / streams;
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..streams)
            .map(|_| {
                // A thread inherits the network namespace of the thread that created it.
                scope.spawn(move || -> Result<()> {
                    let mut stream = connect(transport)?;
                    stream.write_all(&each.to_be_bytes())?;
                    let copied = std::io::copy(&mut (&mut stream).take(each), &mut std::io::sink())?;
                    ensure!(copied == each, "{copied} of {each} bytes");
                    Ok(())
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|_| anyhow::bail!("a reader panicked")))
    })?;
    Ok(bulk as f64 / begin.elapsed().as_secs_f64())
}

/// Returns p50 and p99 of small requests in ms.
fn percentiles(transport: &Transport, requests: usize) -> Result<[f64; 2]> {
    let mut times = Vec::with_capacity(requests);
    for _ in 0..requests {
        let begin = Instant::now();
        request(transport)?;
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    Ok([times[requests / 2], times[requests * 99 / 100]])
}

/// Returns the CPU time of this machine that was not idle in seconds, summed over all CPUs.
fn busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let numbers: Vec<f64> = text
        .lines()
        .next()
        .context("/proc/stat is empty")?
        .split_whitespace()
        .skip(1)
        .filter_map(|n| n.parse().ok())
        .collect();
    // The fields are user nice system idle iowait irq softirq …, in hundredths of a second.
    let idle = numbers.get(3).unwrap_or(&0.0) + numbers.get(4).unwrap_or(&0.0);
    Ok((numbers.iter().take(8).sum::<f64>() - idle) / 100.0)
}
