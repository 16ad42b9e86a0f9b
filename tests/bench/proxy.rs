//! `bench proxy`: streams through the L7 tunnel against a direct TCP connection between the same two nodes (the site's router maps a
//! port for it, which real sites do not). The ways alternate within a run; medians count.
//!
//! The tunnel's way: by address, from the cloud gateway node itself: program, proxy, HTTP/2 over TLS, the site's NAT, its gateway node, the
//! node. Both ends of everything share this machine's cores, so what is compared is what a byte costs.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets::ASCII_MARKDOWN};
use raven_tests::{Lab, Namespace, PoolSpec, Protocol, eventually, process::memory_mb};

/// The node's port, and the port of its router that leads there directly.
const PORT: u16 = 10255;
const DIRECT: u16 = 20255;
/// What one measurement of throughput moves, bytes; and of how many streams.
const BULK: u64 = 400_000_000;
const STREAMS: u64 = 100;
/// Small requests of one measurement of latency.
const REQUESTS: usize = 300;
/// Idle streams.
const IDLE: usize = 1000;
const ANSWER: Duration = Duration::from_secs(60);

/// Runs it.
pub fn run(runs: usize, json: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let seen = runtime.block_on(measure(runs))?;
    if ["proxy-server", "proxy-agent"].iter().any(|name| which(name).is_none()) {
        eprintln!("konnectivity is left out: proxy-server and proxy-agent are not on PATH");
    } else {
        eprintln!("konnectivity is left out: its comparison is not written yet");
    }
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    if json {
        println!(
            "{}",
            serde_json::json!({
                "direct_ratio": round(seen.one), "direct_ratio_100_streams": round(seen.many),
                "direct_ratio_per_cpu_second": round(seen.one_per_cpu),
                "latency_added_ms_p50": round(seen.added[0]), "latency_added_ms_p99": round(seen.added[1]),
                "bytes_per_idle_stream": seen.idle.round(), "konnectivity": null,
            })
        );
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(["what", "through the tunnel"]);
    table.add_row(["one stream, throughput × direct".to_owned(), format!("{:.2}", seen.one)]);
    table.add_row(["one stream, bytes per CPU-second × direct".to_owned(), format!("{:.2}", seen.one_per_cpu)]);
    table.add_row([format!("{STREAMS} streams, throughput × direct"), format!("{:.2}", seen.many)]);
    table.add_row(["small request, added, p50".to_owned(), format!("{:.2} ms", seen.added[0])]);
    table.add_row(["small request, added, p99".to_owned(), format!("{:.2} ms", seen.added[1])]);
    table.add_row(["memory of an idle stream, both gateway nodes".to_owned(), format!("{:.0} bytes", seen.idle)]);
    println!("{table}");
    Ok(())
}

struct Seen {
    one: f64,
    one_per_cpu: f64,
    many: f64,
    /// p50 and p99, ms.
    added: [f64; 2],
    /// Bytes.
    idle: f64,
}

async fn measure(runs: usize) -> Result<Seen> {
    ensure!(runs > 0, "--runs 0 measures nothing");
    let mut pools = PoolSpec::three();
    let mut direct = pools[1].forward(Protocol::Tcp, PORT, 1);
    direct.public_port = DIRECT;
    pools[1].forwards.push(direct);
    let lab = Lab::builder().pools(pools).up().await?;
    lab.cluster().apply_gateways(lab.site()).await?;
    let _controller = lab.start_controller().await?;
    let agents = lab.start_agents().await?;
    serve(&lab.node("x-b").ns)?;
    let client = lab.node("cloud-a").ns.clone();
    let tunnel = SocketAddr::from((lab.node("x-b").lan_v4, PORT));
    let direct = SocketAddr::from((lab.pool("edge-x").public_v4, DIRECT));
    for way in [tunnel, direct] {
        let answers = || async { within(&client, move || ask(way)).await };
        eventually(ANSWER, &format!("{way} answers"), answers).await?;
    }
    let (mut one, mut many, mut per_cpu) = ((vec![], vec![]), (vec![], vec![]), (vec![], vec![]));
    let mut latency = (vec![], vec![]);
    for _ in 0..runs {
        for (way, one, many, per_cpu, latency) in [
            (tunnel, &mut one.0, &mut many.0, &mut per_cpu.0, &mut latency.0),
            (direct, &mut one.1, &mut many.1, &mut per_cpu.1, &mut latency.1),
        ] {
            let busy = busy_seconds()?;
            let rate = within(&client, move || download(way, 1)).await?;
            per_cpu.push(BULK as f64 / (busy_seconds()? - busy).max(0.01));
            one.push(rate);
            many.push(within(&client, move || download(way, STREAMS)).await?);
            latency.push(within(&client, move || percentiles(way)).await?);
        }
    }
    let added = |n: usize| {
        let of = |list: &[[f64; 2]]| median(list.iter().map(|p| p[n]).collect());
        of(&latency.0) - of(&latency.1)
    };
    let pid = |node: &str| agents.iter().find(|a| a.node.name == node).map(|a| a.process.pid()).context("an agent");
    let resident = || -> Result<f64> { Ok(memory_mb(pid("cloud-a")?, "VmRSS")? + memory_mb(pid("x-a")?, "VmRSS")?) };
    let before = resident()?;
    let held = within(&client, move || (0..IDLE).map(|_| ask(tunnel)).collect::<Result<Vec<_>>>()).await?;
    let idle = (resident()? - before) * 1024.0 * 1024.0 / IDLE as f64;
    drop(held);
    Ok(Seen {
        one: median(one.0) / median(one.1),
        one_per_cpu: median(per_cpu.0) / median(per_cpu.1),
        many: median(many.0) / median(many.1),
        added: [added(0), added(1)],
        idle,
    })
}

async fn within<T: Send + 'static>(ns: &Namespace, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    ns.within_async(work).await?
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

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, ANSWER)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER))?;
    Ok(stream)
}

/// A small request by a connection of its own, which is given back open.
fn ask(to: SocketAddr) -> Result<TcpStream> {
    let mut stream = connect(to)?;
    stream.write_all(&0u64.to_be_bytes())?;
    let mut byte = [0];
    stream.read_exact(&mut byte).with_context(|| format!("an answer from {to}"))?;
    Ok(stream)
}

/// Bytes per second of so many streams at once.
fn download(to: SocketAddr, streams: u64) -> Result<f64> {
    let begin = Instant::now();
    let each = BULK / streams;
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..streams)
            .map(|_| {
                // A thread of a scope stays in the network namespace of the one that made it.
                scope.spawn(move || -> Result<()> {
                    let mut stream = connect(to)?;
                    stream.write_all(&each.to_be_bytes())?;
                    let copied = std::io::copy(&mut (&mut stream).take(each), &mut std::io::sink())?;
                    ensure!(copied == each, "{copied} of {each} bytes");
                    Ok(())
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|_| anyhow::bail!("a reader panicked")))
    })?;
    Ok(BULK as f64 / begin.elapsed().as_secs_f64())
}

/// p50 and p99 of small requests, ms.
fn percentiles(to: SocketAddr) -> Result<[f64; 2]> {
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let begin = Instant::now();
        ask(to)?;
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    Ok([times[REQUESTS / 2], times[REQUESTS * 99 / 100]])
}

/// Seconds that this machine's CPUs were not idle, all together.
fn busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let numbers: Vec<f64> = text.lines().next().context("a line")?.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    // user nice system idle iowait irq softirq …, in hundredths.
    let idle = numbers.get(3).unwrap_or(&0.0) + numbers.get(4).unwrap_or(&0.0);
    Ok((numbers.iter().take(8).sum::<f64>() - idle) / 100.0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn which(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file())
}
