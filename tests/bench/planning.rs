//! `bench plan`: time and memory of `plan()`, for a gateway node of the cloud and for a member.
//!
//! Each size runs in a separate process, so that its peak of resident memory can be measured. The baseline is the plan
//! at 100 nodes: the results show how the cost grows with the cluster.

use std::{hint::black_box, process::Command, time::Instant};

use anyhow::{Context, Result};
use comfy_table::{Table, presets::ASCII_MARKDOWN};
use raven_agent::{
    plan::{Me, plan},
    topology::{Inputs, build},
};
use raven_api::{
    Gateway, GatewayNode, GatewaySpec, GatewayStatus,
    gateway::{Endpoint, ExposeType, NodeInfo},
    gateway_node::GatewayNodeSpec,
};
use raven_tests::process::memory_mb;
use serde::{Deserialize, Serialize};

/// Numbers of nodes to measure.
const NODES: [usize; 3] = [100, 1_000, 10_000];
/// Number of nodes per pool.
const POOL: usize = 10;
/// Environment variable that passes the number of nodes to a child process.
const SIZE: &str = "RAVEN_BENCH_PLAN_NODES";

/// Cost at one size.
#[derive(Serialize, Deserialize)]
struct Cost {
    nodes: usize,
    build_ms: f64,
    plan_gateway_ms: f64,
    plan_ordinary_ms: f64,
    diff_unchanged_ms: f64,
    resident_mb: f64,
}

/// Runs all sizes; in a child process, one.
pub(crate) fn run(json: bool) -> Result<()> {
    if let Ok(nodes) = std::env::var(SIZE) {
        println!("{}", serde_json::to_string(&measure(nodes.parse()?)?)?);
        return Ok(());
    }
    let mut costs: Vec<Cost> = Vec::new();
    for nodes in NODES {
        let output = Command::new(std::env::current_exe()?)
            .arg("plan")
            .env(SIZE, nodes.to_string())
            .output()
            .context("run a child")?;
        costs.push(serde_json::from_slice(&output.stdout).context("parse the child's output")?);
    }
    if json {
        println!("{}", serde_json::json!({ "sizes": costs }));
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "nodes",
        "topology",
        "plan, gateway node",
        "plan, member",
        "diff without changes",
        "plan per node",
        "peak resident",
    ]);
    let per_node = |c: &Cost| c.plan_gateway_ms / c.nodes as f64;
    for cost in &costs {
        table.add_row([
            cost.nodes.to_string(),
            format!("{:.2} ms", cost.build_ms),
            format!("{:.2} ms", cost.plan_gateway_ms),
            format!("{:.2} ms", cost.plan_ordinary_ms),
            format!("{:.2} ms", cost.diff_unchanged_ms),
            format!("{:.2} ×", per_node(cost) / per_node(&costs[0])),
            format!("{:.0} MB", cost.resident_mb),
        ]);
    }
    println!("{table}");
    Ok(())
}

fn measure(nodes: usize) -> Result<Cost> {
    let inputs = cluster(nodes);
    let (topology, build_ms) = timed(|| build(&inputs));
    let me = |node: &str| Me { node: node.to_owned(), ..Me::default() };
    let (gateway, plan_gateway_ms) = timed(|| plan(&topology, &me("n0-0")));
    let (ordinary, plan_ordinary_ms) = timed(|| plan(&topology, &me("n0-1")));
    anyhow::ensure!(
        gateway.state.remote.len() == 2 * (nodes - POOL) && ordinary.state.remote.len() == gateway.state.remote.len()
    );
    let ((), diff_unchanged_ms) = timed(|| assert!(raven_agent::diff::diff(&gateway.state, &gateway.state).is_empty()));
    Ok(Cost {
        nodes,
        build_ms,
        plan_gateway_ms,
        plan_ordinary_ms,
        diff_unchanged_ms,
        resident_mb: memory_mb("self", "VmHWM")?,
    })
}

/// Returns the last result and the shortest of five times in ms; longer times include other processes' work.
fn timed<T>(work: impl Fn() -> T) -> (T, f64) {
    let once = || {
        let start = Instant::now();
        let result = black_box(work());
        (result, start.elapsed().as_secs_f64() * 1e3)
    };
    let mut best = once();
    for _ in 0..4 {
        let next = once();
        best = (next.0, best.1.min(next.1));
    }
    best
}

/// Returns a cloud pool and edge pools of ten nodes with one gateway node each.
fn cluster(nodes: usize) -> Inputs {
    let pools = nodes / POOL;
    let pool = |p: usize| {
        let mut gateway = Gateway::new(&format!("pool-{p}"), GatewaySpec::default());
        let cloud = p == 0;
        gateway.spec.expose_type = if cloud { ExposeType::PublicIP } else { ExposeType::Edge };
        let node = |n: usize| {
            let id = p * POOL + n;
            NodeInfo {
                node_name: format!("n{p}-{n}"),
                private_ip: format!("172.{}.{}.{}", 16 + id / 65_536, id / 256 % 256, id % 256),
                subnets: vec![format!("10.{}.{}.0/24", id / 256, id % 256), format!("fd00:{id:x}::/64")],
                ..NodeInfo::default()
            }
        };
        let endpoint = Endpoint {
            node_name: format!("n{p}-0"),
            under_nat: !cloud,
            public_ip: cloud.then(|| "198.51.100.10".to_owned()),
            ..Endpoint::default()
        };
        gateway.status = Some(GatewayStatus {
            nodes: (0..POOL).map(node).collect(),
            active_endpoints: vec![endpoint],
            ..GatewayStatus::default()
        });
        gateway
    };
    let key = |p: usize| {
        let mut bytes = [0u8; 32];
        bytes[..8].copy_from_slice(&(p as u64 + 1).to_be_bytes());
        let key = raven_agent::topology::PublicKey(bytes).to_string();
        GatewayNode::new(&format!("n{p}-0"), GatewayNodeSpec { public_key: Some(key), ..GatewayNodeSpec::default() })
    };
    Inputs {
        gateways: (0..pools).map(pool).collect(),
        gateway_nodes: (0..pools).map(key).collect(),
        ..Inputs::default()
    }
}
