//! Ten thousand nodes in a thousand pools: measures the time until one agent's maps contain them, and the memory used.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use raven_api::{
    Gateway, GatewayNode, GatewaySpec, GatewayStatus,
    gateway::{Endpoint, ExposeType, NodeInfo},
    gateway_node::GatewayNodeSpec,
};
use raven_tests::{Lab, eventually, process::memory_mb, proof, require_root};

const POOLS: usize = 1_000;
const NODES_PER_POOL: usize = 10;

/// Returns a pool as the controller would publish it.
fn pool(number: usize) -> (Gateway, GatewayStatus, GatewayNode) {
    let node = |n: usize| {
        let id = number * NODES_PER_POOL + n;
        NodeInfo {
            node_name: format!("p{number}-n{n}"),
            private_ip: format!("172.{}.{}.{}", 16 + id / 65_536, id / 256 % 256, id % 256),
            subnets: vec![format!("11.{}.{}.0/24", id / 256, id % 256), format!("fd11:{id:x}::/64")],
            ..NodeInfo::default()
        }
    };
    let spec = GatewaySpec { expose_type: ExposeType::PublicIP, ..GatewaySpec::default() };
    let endpoint = Endpoint {
        node_name: format!("p{number}-n0"),
        public_ip: Some(format!("203.{}.{}.1", number / 250, number % 250)),
        ..Endpoint::default()
    };
    let status = GatewayStatus {
        nodes: (0..NODES_PER_POOL).map(node).collect(),
        active_endpoints: vec![endpoint],
        ..GatewayStatus::default()
    };
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&(number as u64 + 1).to_be_bytes());
    let key = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, key);
    let announced = GatewayNodeSpec { public_key: Some(key), ..GatewayNodeSpec::default() };
    (Gateway::new(&format!("pool-{number}"), spec), status, GatewayNode::new(&format!("p{number}-n0"), announced))
}

async fn publish(lab: &Lab, number: usize) -> Result<()> {
    let (gateways, nodes): (Api<Gateway>, Api<GatewayNode>) =
        (Api::all(lab.cluster().client()), Api::all(lab.cluster().client()));
    let (gateway, status, node) = pool(number);
    let name = format!("pool-{number}");
    gateways.create(&PostParams::default(), &gateway).await.with_context(|| format!("create {name}"))?;
    let patch = serde_json::json!({ "status": status });
    gateways
        .patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .with_context(|| format!("set the status of {name}"))?;
    nodes.create(&PostParams::default(), &node).await.with_context(|| format!("create the GatewayNode of {name}"))?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_nodes_fit_into_one_agents_maps() {
    require_root!();
    let lab = Lab::builder().up().await.expect("start the lab");
    lab.cluster().apply_gateways(lab.site()).await.expect("apply the lab's Gateways");
    // The controller must put the agent's own node into its pool; afterwards it would only revert the test's writes.
    // (The readiness of the agent is not sufficient, because an agent without a pool is ready too.)
    let mut controller = lab.start_controller().await.expect("start the controller");
    let agent = lab.start_agent("x-b").await.expect("start the agent");
    proof::ready(&agent).await.expect("the agent is ready");
    let gateways: Api<Gateway> = Api::all(lab.cluster().client());
    eventually(Duration::from_secs(30), "the controller has put x-b into its pool", || async {
        let nodes = gateways.get("edge-x").await?.status.context("the Gateway has no status")?.nodes;
        ensure!(nodes.iter().any(|n| n.node_name == "x-b"), "the nodes are {nodes:?}");
        Ok(())
    })
    .await
    .expect("x-b is in its pool");
    controller.kill().expect("kill the controller");
    let resident = || memory_mb(agent.process.pid(), "VmRSS").expect("read the agent's memory");
    let before = resident();

    let writes = stream::iter(0..POOLS).map(|n| publish(&lab, n)).buffer_unordered(16).try_collect::<Vec<()>>().await;
    writes.expect("publish the pools");
    let start = Instant::now();
    let remote = |map: &str| -> Result<usize> {
        let dump = agent
            .node
            .ns
            .run("bpftool", &["-j", "map", "dump", "pinned", &format!("/sys/fs/bpf/raven/v1/maps/{map}")])?;
        Ok(serde_json::from_str::<Vec<serde_json::Value>>(&dump)?.len())
    };
    let wanted = POOLS * NODES_PER_POOL;
    eventually(Duration::from_secs(180), "the maps contain every prefix", || async {
        let (v4, v6) = (remote("REMOTE4")?, remote("REMOTE6")?);
        ensure!(v4 >= wanted && v6 >= wanted, "{v4} and {v6} of {wanted}");
        Ok(())
    })
    .await
    .expect("all prefixes are in the maps");
    println!(
        "scale: {wanted} nodes in {POOLS} pools: in the maps {} ms after the last write; agent {before:.0} MB → {:.0} MB",
        start.elapsed().as_millis(),
        resident()
    );
    let shown = agent
        .node
        .ns
        .sh("for map in /sys/fs/bpf/raven/v1/maps/*; do bpftool -j map show pinned $map; done")
        .expect("run bpftool");
    let mut total = 0;
    for map in shown.lines().map(serde_json::from_str::<serde_json::Value>) {
        let map = map.expect("bpftool prints JSON");
        let bytes = map["bytes_memlock"].as_u64().expect("the map has bytes_memlock");
        total += bytes;
        println!(
            "scale: map {}: {} entries at most, {} KB",
            map["name"].as_str().unwrap_or_default(),
            map["max_entries"],
            bytes >> 10
        );
    }
    println!("scale: all maps: {} MB", total >> 20);
    assert!(total < 128 << 20, "{total} bytes of maps");
    let routes = agent.node.ns.sh("ip route show table 9027 | wc -l").expect("list the routes");
    assert!(routes.trim().parse::<usize>().expect("a number") >= wanted, "{routes} routes");
    assert!(resident() < 400.0, "the agent uses too much memory");
}
