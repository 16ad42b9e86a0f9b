//! `bench tunnel`: throughput of one TCP connection between two gateway nodes through Raven, and through bare WireGuard
//! of the same kind between the same two hosts.
//!
//! The two variants alternate within a run, each host is pinned to one core, and the median of the runs' ratios counts:
//! scheduling of four engines on two cores would vary more than the difference between the variants.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets::ASCII_MARKDOWN};
use raven_tests::{
    Lab, Node, PoolSpec, Protocol,
    bare::{Bare, Engine},
    eventually, offline, probe, proof,
};

use crate::{iperf, median, median_ratio};

/// Duration of one measurement in seconds.
const SECONDS: &str = "3";
/// Number of the bare tunnel, and its port.
const BARE: u8 = 1;
const BARE_PORT: u16 = 4501;

/// Runs the benchmark.
pub(crate) fn run(runs: usize, json: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let measured = runtime.block_on(measure(runs))?;
    let Measured { backend, raven, bare, ratio } = &measured;
    if json {
        println!(
            "{}",
            serde_json::json!({ "wireguard": backend, "raven_mbit": raven.round(), "bare_mbit": bare.round(), "ratio": (ratio * 1000.0).round() / 1000.0 })
        );
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(["variant", "WireGuard", "Mbit/s", "× bare"]);
    table.add_row(["Raven".to_owned(), (*backend).to_owned(), format!("{raven:.0}"), format!("{ratio:.2}")]);
    table.add_row(["bare WireGuard".to_owned(), (*backend).to_owned(), format!("{bare:.0}"), "1.00".to_owned()]);
    println!("{table}");
    Ok(())
}

struct Measured {
    backend: &'static str,
    /// Throughput in Mbit/s.
    raven: f64,
    bare: f64,
    ratio: f64,
}

async fn measure(runs: usize) -> Result<Measured> {
    ensure!(runs > 0, "--runs must be at least 1");
    let mut pools = PoolSpec::three();
    pools.truncate(2);
    let forward = pools[0].forward(Protocol::Udp, BARE_PORT, 0);
    pools[0].forwards.push(forward);
    let lab = Lab::builder().pools(pools).without_kubernetes().up().await?;
    offline::write(&lab)?;
    let _cloud = lab.start_agent_with("cloud-a", vec!["--offline".to_owned()])?;
    let _edge = lab.start_agent_with("x-a", vec!["--offline".to_owned()])?;
    let (server, client) = (lab.node("cloud-a"), lab.node("x-a"));
    let target = server.bridge_v4();
    let answers = || async { probe::ping(&client.ns, target.into()).await?.context("no answer") };
    eventually(proof::CONVERGENCE, "the two hosts are connected through Raven", answers).await?;
    let (backend, without) = bare(&lab, server, client).await?;
    iperf::pin(client, 0)?;
    iperf::pin(server, 1)?;
    let _listener = iperf::listen(&lab, server).await?;
    let (mut raven, mut bare) = (Vec::new(), Vec::new());
    let (target, baseline) = (target.to_string(), without.v4[0].to_string());
    for run in 0..runs {
        let mut variants = [(&mut raven, target.as_str()), (&mut bare, baseline.as_str())];
        // The order alternates, so that no variant is always first.
        variants.rotate_left(run % 2);
        for (seen, to) in variants {
            seen.push(iperf::mbit(&iperf::run(&client.ns, to, SECONDS, &[]).await?)?);
        }
    }
    Ok(Measured { backend, ratio: median_ratio(&raven, &bare), raven: median(&raven), bare: median(&bare) })
}

/// Creates bare WireGuard between the two hosts: the kernel's or, if it has none, Raven's engine.
async fn bare(lab: &Lab, server: &Node, client: &Node) -> Result<(&'static str, Bare)> {
    let has_kernel = server.ns.sh("ip link add probe type wireguard 2>/dev/null && ip link del probe").is_ok();
    let (backend, engine) = if has_kernel { ("kernel", Engine::Kernel) } else { ("userspace", Engine::Raven) };
    let endpoint = |port| SocketAddr::from((lab.cloud().public_v4, port));
    let bare = Bare::start(lab, BARE, [(server, engine.clone()), (client, engine)], endpoint).await?;
    Ok((backend, bare))
}
