//! `bench engine`: Raven's userspace WireGuard engine against wireguard-go, on bare devices between the same two hosts.
//!
//! Each host is pinned to a core. The engines alternate within a run, and the median of the runs' ratios counts.

use anyhow::{Context, Result};
use comfy_table::{Table, presets::ASCII_MARKDOWN};
use raven_tests::{
    Lab, PoolSpec,
    bare::{Bare, Engine},
    kubernetes::binaries::WIREGUARD,
    namespace::Namespace,
};
use serde_json::Value;

use crate::{iperf, median, median_ratio};

/// Duration of one measurement in seconds.
const SECONDS: &str = "3";
/// Rate in Mbit/s at which the CPU time is measured: both engines are far from their limit.
const MODERATE: &str = "400M";

/// What is measured: the key in JSON, its description and unit, and iperf3's arguments.
const MEASUREMENTS: [Measurement; 5] = [
    Measurement { key: "ratio_1", what: "one TCP stream", unit: Unit::Mbit, arguments: &[] },
    Measurement { key: "ratio_8", what: "eight TCP streams", unit: Unit::Mbit, arguments: &["-P", "8"] },
    Measurement {
        key: "ratio_udp",
        what: "UDP, packets of 1,400 bytes",
        unit: Unit::Mbit,
        arguments: &["-u", "-b", "0", "-l", "1372"],
    },
    Measurement {
        key: "ratio_pps",
        what: "UDP, payload of 64 bytes",
        unit: Unit::Packets,
        arguments: &["-u", "-b", "0", "-l", "64"],
    },
    Measurement {
        key: "ratio_per_cpu_s",
        what: "one TCP stream at 400 Mbit/s",
        unit: Unit::BytesPerCpu,
        arguments: &["-b", MODERATE],
    },
];

struct Measurement {
    key: &'static str,
    what: &'static str,
    unit: Unit,
    arguments: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// Mbit/s that arrived.
    Mbit,
    /// Packets per second that arrived.
    Packets,
    /// MB that arrived per second of CPU time of both hosts.
    BytesPerCpu,
}

impl Unit {
    fn as_str(self) -> &'static str {
        match self {
            Self::Mbit => "Mbit/s",
            Self::Packets => "packets/s",
            Self::BytesPerCpu => "MB per CPU-second",
        }
    }
}

/// Runs the benchmark.
pub(crate) fn run(runs: usize, json: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let measured = runtime.block_on(measure(runs))?;
    if json {
        let ratios = measured.iter().map(|(what, ours, theirs)| {
            (what.key.to_owned(), Value::from((median_ratio(ours, theirs) * 1000.0).round() / 1000.0))
        });
        println!("{}", Value::Object(ratios.collect()));
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(["traffic", "unit", "Raven's engine", "wireguard-go", "ratio"]);
    for (what, ours, theirs) in &measured {
        table.add_row([
            what.what.to_owned(),
            what.unit.as_str().to_owned(),
            format!("{:.0}", median(ours)),
            format!("{:.0}", median(theirs)),
            format!("{:.2}", median_ratio(ours, theirs)),
        ]);
    }
    println!("{table}");
    Ok(())
}

type Measured = (&'static Measurement, Vec<f64>, Vec<f64>);

async fn measure(runs: usize) -> Result<Vec<Measured>> {
    anyhow::ensure!(runs > 0, "--runs must be at least 1");
    let wireguard_go = WIREGUARD.find_or_build().await?.program("wireguard");
    let mut pools = PoolSpec::three();
    pools.truncate(1);
    let lab = Lab::builder().pools(pools).without_kubernetes().up().await?;
    let (server, client) = (lab.node("cloud-a"), lab.node("cloud-b"));
    let endpoint = |port| (server.lan_v4, port).into();
    let go = Engine::Go(wireguard_go);
    let ours = Bare::start(&lab, 1, [(server, Engine::Raven), (client, Engine::Raven)], endpoint).await?;
    let theirs = Bare::start(&lab, 2, [(server, go.clone()), (client, go)], endpoint).await?;
    let _listener = iperf::listen(&lab, server).await?;
    iperf::pin(server, 1)?;
    iperf::pin(client, 0)?;
    let mut all = Vec::new();
    for measurement in &MEASUREMENTS {
        let mut seen = (Vec::new(), Vec::new());
        for run in 0..runs {
            let mut variants = [(&mut seen.0, &ours), (&mut seen.1, &theirs)];
            // The order alternates, so that no engine is always first.
            variants.rotate_left(run % 2);
            for (seen, tunnel) in variants {
                seen.push(one(&client.ns, &tunnel.v4[0].to_string(), measurement).await?);
            }
        }
        all.push((measurement, seen.0, seen.1));
    }
    Ok(all)
}

/// One measurement.
async fn one(from: &Namespace, to: &str, what: &Measurement) -> Result<f64> {
    let before = busy()?;
    let end = iperf::run(from, to, SECONDS, what.arguments).await?;
    let cpu = busy()? - before;
    match what.unit {
        Unit::Mbit => iperf::mbit(&end),
        Unit::Packets => {
            let sum = |name: &str| iperf::number(&end["sum"][name]);
            Ok((sum("packets")? - sum("lost_packets")?) / sum("seconds")?)
        }
        Unit::BytesPerCpu => Ok(iperf::number(&end["sum_received"]["bytes"])? / 1e6 / cpu),
    }
}

/// CPU time that this machine has used, in seconds: /proc/stat without idle and iowait.
fn busy() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    let used = ticks.iter().take(8).enumerate().filter(|(at, _)| ![3, 4].contains(at)).map(|(_, ticks)| ticks);
    // Linux reports hundredths of a second (USER_HZ) on all architectures.
    Ok(used.sum::<u64>() as f64 / 100.0)
}
