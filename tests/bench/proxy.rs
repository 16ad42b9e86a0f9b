//! `bench proxy`: streams through the L7 tunnel against a direct TCP connection between the same two nodes (the site's router maps a
//! port for it, which real sites do not), and against konnectivity where its programs are on PATH; on a link that is as
//! fast as this machine copies, on one of 1 Gbit/s, and on a bad one. The ways alternate within a run; medians count.
//!
//! The tunnel's way: by address, from the cloud gateway node itself: program, proxy, HTTP/2 over TLS, the site's NAT,
//! its gateway node, the node. Konnectivity's: an HTTP CONNECT by a local socket to its server on the same node, its
//! agent on the same gateway node of the site. Both ends of everything share this machine's cores, so what is compared
//! is what a byte costs. Direct is one TCP connection; any tunnel is three in a row. What that alone costs is measured,
//! too: two relays in the places of the gateway nodes that do nothing but move bytes within the kernel (splice), with
//! no TLS, no multiplexing and nobody asked who he is. Nothing can be better.

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

/// The node's port, and the port of its router that leads there directly.
const PORT: u16 = 10255;
const DIRECT: u16 = 20255;
/// Where the relays listen.
const RELAYED: u16 = 20256;
/// Idle streams.
const IDLE: usize = 1000;
const ANSWER: Duration = Duration::from_secs(60);

/// A link, and how much is sent over it.
struct Link {
    name: &'static str,
    /// Each way, and one frame of so many lost.
    bad: Option<(Duration, u64)>,
    /// What one measurement of throughput moves, bytes; and of how many streams at once.
    bulk: u64,
    streams: u64,
    /// Small requests of one measurement of latency.
    requests: usize,
}

const GOOD: Link = Link { name: "good", bad: None, bulk: 400_000_000, streams: 100, requests: 300 };
/// The line of a site that has a good one.
const GIGABIT: Link = Link { name: "1 Gbit/s", ..GOOD };
const BAD: Link = Link { name: "50 ms, 1 % lost", bad: Some((Duration::from_millis(25), 100)), bulk: 3_000_000, streams: 20, requests: 60 };

/// Runs it.
pub fn run(runs: usize, json: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let seen = runtime.block_on(measure(runs))?;
    let konnectivity = seen.good.contains_key(KONNECTIVITY);
    if !konnectivity {
        eprintln!("konnectivity is left out: proxy-server and proxy-agent are not both on PATH");
    }
    if json {
        println!("{}", seen.json());
        return Ok(());
    }
    let mut table = Table::new();
    let ways: Vec<&str> = [TUNNEL, KONNECTIVITY, RELAYS].into_iter().filter(|way| seen.good.contains_key(way)).collect();
    table.load_style(ASCII_MARKDOWN).set_header(["link", "what"].into_iter().chain(ways.iter().copied()));
    let ratio = |value: f64| format!("{value:.2}");
    let ms = |value: f64| format!("{value:.2} ms");
    for (link, seen) in [(&GOOD, &seen.good), (&GIGABIT, &seen.gigabit), (&BAD, &seen.bad)] {
        let mut row = |what: String, cell: &dyn Fn(&Seen) -> String| {
            let cells = ways.iter().filter_map(|way| seen.get(way)).map(cell);
            table.add_row([link.name.to_owned(), what].into_iter().chain(cells));
        };
        row("one stream, throughput × direct".to_owned(), &|s| ratio(s.one));
        row("one stream, bytes per CPU-second × direct".to_owned(), &|s| ratio(s.per_cpu));
        row(format!("{} streams, throughput × direct", link.streams), &|s| ratio(s.many));
        row("small request, added, p50".to_owned(), &|s| ms(s.added[0]));
        row("small request, added, p99".to_owned(), &|s| ms(s.added[1]));
        if seen.values().any(|s| s.idle > 0.0) {
            row("memory of an idle stream, both ends".to_owned(), &|s| {
                if s.idle > 0.0 { format!("{:.0} bytes", s.idle) } else { String::new() }
            });
        }
    }
    println!("{table}");
    Ok(())
}

const TUNNEL: &str = "tunnel";
const KONNECTIVITY: &str = "konnectivity";
const RELAYS: &str = "two bare relays";

/// One way, compared with a direct connection on the same link.
#[derive(Clone, Default)]
struct Seen {
    one: f64,
    per_cpu: f64,
    many: f64,
    /// p50 and p99, ms.
    added: [f64; 2],
    /// Bytes; measured on one link.
    idle: f64,
}

struct Measured {
    good: BTreeMap<&'static str, Seen>,
    gigabit: BTreeMap<&'static str, Seen>,
    bad: BTreeMap<&'static str, Seen>,
}

impl Measured {
    fn json(&self) -> Value {
        let of = |way: &str| -> Value {
            let Some(good) = self.good.get(way) else { return Value::Null };
            let mut object = fields(good);
            object["bytes_per_idle_stream"] = json!(good.idle.round());
            object["gigabit_link"] = self.gigabit.get(way).map_or(Value::Null, fields);
            object["bad_link"] = self.bad.get(way).map_or(Value::Null, fields);
            object
        };
        let mut object = of(TUNNEL);
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

/// How the node is reached.
#[derive(Clone, Debug)]
enum Way {
    Tcp(SocketAddr),
    Konnectivity(konnectivity::Way),
}

async fn measure(runs: usize) -> Result<Measured> {
    ensure!(runs > 0, "--runs 0 measures nothing");
    let mut pools = PoolSpec::three();
    let mut direct = pools[1].forward(Protocol::Tcp, PORT, 1);
    direct.public_port = DIRECT;
    pools[1].forwards.push(direct);
    let relayed = pools[1].forward(Protocol::Tcp, RELAYED, 0);
    pools[1].forwards.push(relayed);
    let server = pools[0].forward(Protocol::Tcp, konnectivity::AGENT_PORT, 0);
    pools[0].forwards.push(server);
    let lab = Lab::builder().pools(pools).up().await?;
    // What every distribution's kernel does unless told otherwise; this machine's may have another default, which
    // namespaces inherit.
    fs::write("/proc/sys/net/ipv4/tcp_allowed_congestion_control", "reno cubic bbr")?;
    for ns in lab.site().namespaces() {
        ns.sh("echo cubic > /proc/sys/net/ipv4/tcp_congestion_control")?;
    }
    lab.cluster().apply_gateways(lab.site()).await?;
    let _controller = lab.start_controller().await?;
    let mut agents = lab.start_agents().await?;
    for agent in &mut agents {
        // Without XDP at the uplinks: it costs a network card nothing, but a veth copies every packet for it and joins
        // none, which all ways would be measured by.
        agent.arguments.extend(["--tier".to_owned(), "tc".to_owned()]);
        agent.restart()?;
    }
    serve(&lab.node("x-b").ns)?;
    let target = SocketAddr::from((lab.node("x-b").lan_v4, PORT));
    let konnectivity = Konnectivity::start(&lab, "cloud-a", "x-a")?;
    let pid = |node: &str| agents.iter().find(|a| a.node.name == node).map(|a| a.process.pid()).context("an agent");
    let mut ways = vec![(TUNNEL, Way::Tcp(target), vec![pid("cloud-a")?, pid("x-a")?])];
    ways.extend(konnectivity.as_ref().map(|k| (KONNECTIVITY, Way::Konnectivity(k.way(target)), k.pids())));
    let site = lab.pool("edge-x").public_v4;
    relay(&lab.node("x-a").ns, target)?;
    relay(&lab.node("cloud-a").ns, (site, RELAYED).into())?;
    ways.push((RELAYS, Way::Tcp(([127, 0, 0, 1], RELAYED).into()), Vec::new()));
    let direct = Way::Tcp((site, DIRECT).into());
    let client = lab.node("cloud-a").ns.clone();
    for way in ways.iter().map(|(_, way, _)| way).chain([&direct]) {
        let answers = || async { within(&client, way, |way| ask(&way).map(drop)).await };
        eventually(ANSWER, &format!("{way:?} answers"), answers).await?;
    }
    let mut good = compare(&client, &ways, &direct, &GOOD, runs).await?;
    for (name, way, pids) in ways.iter().filter(|(_, _, pids)| !pids.is_empty()) {
        let idle = idle(&client, way, pids).await?;
        good.entry(name).or_default().idle = idle;
    }
    let line = &lab.pool("edge-x").router;
    line.sh("tc qdisc add dev wan root tbf rate 1gbit burst 256kb latency 10ms")?;
    let gigabit = compare(&client, &ways, &direct, &GIGABIT, runs).await?;
    line.sh("tc qdisc del dev wan root")?;
    let (delay, one_in) = BAD.bad.context("a bad link is bad")?;
    let _impaired = lab.impair("edge-x", delay, one_in)?;
    let bad = compare(&client, &ways, &direct, &BAD, runs).await?;
    Ok(Measured { good, gigabit, bad })
}

/// Every way against the direct one, in turn.
async fn compare(
    client: &Namespace,
    ways: &[(&'static str, Way, Vec<u32>)],
    direct: &Way,
    link: &'static Link,
    runs: usize,
) -> Result<BTreeMap<&'static str, Seen>> {
    let mut raw: BTreeMap<&str, Raw> = BTreeMap::new();
    for _ in 0..runs {
        for (name, way) in ways.iter().map(|(name, way, _)| (*name, way)).chain([("direct", direct)]) {
            let raw = raw.entry(name).or_default();
            let busy = busy_seconds()?;
            raw.one.push(within(client, way, |way| download(&way, link.bulk, 1)).await?);
            raw.per_cpu.push(link.bulk as f64 / (busy_seconds()? - busy).max(0.01));
            raw.many.push(within(client, way, |way| download(&way, link.bulk, link.streams)).await?);
            raw.latency.push(within(client, way, |way| percentiles(&way, link.requests)).await?);
        }
    }
    let direct = raw.remove("direct").context("it was measured")?;
    let against = |raw: &Raw| Seen {
        one: median(&raw.one) / median(&direct.one),
        per_cpu: median(&raw.per_cpu) / median(&direct.per_cpu),
        many: median(&raw.many) / median(&direct.many),
        added: [0, 1].map(|n| percentile(&raw.latency, n) - percentile(&direct.latency, n)),
        idle: 0.0,
    };
    Ok(ways.iter().map(|(name, _, _)| (*name, against(&raw[name]))).collect())
}

/// What was measured, run by run.
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

/// Bytes that both ends keep for a stream on which nothing happens.
async fn idle(client: &Namespace, way: &Way, pids: &[u32]) -> Result<f64> {
    let resident = || pids.iter().map(|pid| memory_mb(*pid, "VmRSS")).sum::<Result<f64>>();
    let before = resident()?;
    let held = within(client, way, |way| (0..IDLE).map(|_| ask(&way)).collect::<Result<Vec<_>>>()).await?;
    let after = resident()?;
    drop(held);
    Ok((after - before) * 1024.0 * 1024.0 / IDLE as f64)
}

async fn within<T: Send + 'static>(ns: &Namespace, way: &Way, work: impl FnOnce(Way) -> Result<T> + Send + 'static) -> Result<T> {
    let way = way.clone();
    ns.within_async(move || work(way)).await?
}

/// On the node: a number of bytes (8, big-endian) is answered with as many; 0 with one byte, and the connection stays.
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

/// Connects whoever comes to its port with `to`, both ways, by threads: the standard library moves bytes between
/// sockets by splice(2).
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
                // A thread stays in the network namespace of the one that made it.
                std::thread::spawn(move || connect(client));
            }
        });
    })
}

/// A connection to the node.
trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

fn connect(way: &Way) -> Result<Box<dyn Stream>> {
    match way {
        Way::Tcp(to) => {
            let stream = TcpStream::connect_timeout(to, ANSWER)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(ANSWER))?;
            Ok(Box::new(stream))
        }
        Way::Konnectivity(way) => Ok(Box::new(way.connect(ANSWER)?)),
    }
}

/// A small request by a connection of its own, which is given back open.
fn ask(way: &Way) -> Result<Box<dyn Stream>> {
    let mut stream = connect(way)?;
    stream.write_all(&0u64.to_be_bytes())?;
    let mut byte = [0];
    stream.read_exact(&mut byte).with_context(|| format!("an answer by {way:?}"))?;
    Ok(stream)
}

/// Bytes per second of so many streams at once.
fn download(way: &Way, bulk: u64, streams: u64) -> Result<f64> {
    let begin = Instant::now();
    let each = bulk / streams;
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..streams)
            .map(|_| {
                // A thread of a scope stays in the network namespace of the one that made it.
                scope.spawn(move || -> Result<()> {
                    let mut stream = connect(way)?;
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

/// p50 and p99 of small requests, ms.
fn percentiles(way: &Way, requests: usize) -> Result<[f64; 2]> {
    let mut times = Vec::with_capacity(requests);
    for _ in 0..requests {
        let begin = Instant::now();
        ask(way)?;
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    Ok([times[requests / 2], times[requests * 99 / 100]])
}

/// Seconds that this machine's CPUs were not idle, all together.
fn busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let numbers: Vec<f64> = text.lines().next().context("a line")?.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    // user nice system idle iowait irq softirq …, in hundredths.
    let idle = numbers.get(3).unwrap_or(&0.0) + numbers.get(4).unwrap_or(&0.0);
    Ok((numbers.iter().take(8).sum::<f64>() - idle) / 100.0)
}
