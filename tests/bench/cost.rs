//! `bench cost`: what Raven costs a site on a metered link, and the API server, as the number of sites grows.
//!
//! The API server and the controller are real, and the bytes are counted where an edge node receives them. Other sites are
//! synthetic: their objects are written as kubelets and agents write them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets::ASCII_MARKDOWN};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::{
    Api, Resource, ResourceExt,
    api::{Patch, PatchParams},
};
use raven_api::{
    Gateway, GatewayNode,
    names::{LABEL_EDGE_WORKER, LABEL_GATEWAY},
};
use raven_tests::{Lab, eventually, kubernetes::Cluster, meter::Meter, process::memory_mb, proof};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// Numbers of sites, and the bytes that one edge agent may receive per day with each.
const SITES: [(usize, f64); 3] = [(10, 1e6), (1_000, 5e6), (10_000, 20e6)];
/// Share of the sites that reconnect per hour.
const CHURN: f64 = 0.01;
/// Reconnections that are measured, at most.
const RECONNECTIONS: usize = 20;
/// Bytes that an idle site may cost per month, L3 and L7 together.
const MONTH: f64 = 60e6;
/// Bytes of the largest object.
const OBJECT: usize = 300_000;
/// Concurrent writes of synthetic objects.
const WRITERS: usize = 16;
/// Longer than the 290 s after which a watch begins again.
const IDLE: Duration = Duration::from_secs(300);
/// A WireGuard session is renewed once in this time.
const SESSION: Duration = Duration::from_secs(120);

/// The results at one size.
struct Row {
    sites: usize,
    bound: f64,
    /// Bytes per day without any event.
    idle: f64,
    /// Bytes per reconnection of another site.
    reconnection: f64,
    /// Name and bytes of the largest object.
    largest: (String, usize),
    /// Seconds from the start of the agent until its maps have every prefix.
    sync: f64,
    agent_mb: f64,
    controller_mb: f64,
}

impl Row {
    fn day(&self) -> f64 {
        self.idle + self.reconnection * self.sites as f64 * CHURN * 24.0
    }
}

/// Runs the benchmark.
pub(crate) fn run(json: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (rows, month) = runtime.block_on(measure())?;
    if json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|row| {
                json!({ "sites": row.sites, "bytes_per_day": row.day().round(), "bound": row.bound, "idle_bytes_per_day": row.idle.round(),
                    "bytes_per_reconnection": row.reconnection.round(), "largest_object": row.largest.0, "largest_object_bytes": row.largest.1,
                    "sync_seconds": row.sync, "agent_mb": row.agent_mb, "controller_mb": row.controller_mb })
            })
            .collect();
        println!("{}", json!({ "agent": rows, "idle_site_bytes_per_month": month.round(), "idle_site_bound": MONTH }));
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "sites",
        "MB per day to one edge agent",
        "bound",
        "of it without events",
        "kB per reconnection elsewhere",
        "largest object",
        "start to complete maps",
        "agent",
        "controller",
    ]);
    for row in &rows {
        table.add_row([
            row.sites.to_string(),
            format!("{:.2}", row.day() / 1e6),
            format!("{:.0}", row.bound / 1e6),
            format!("{:.2}", row.idle / 1e6),
            format!("{:.1}", row.reconnection / 1e3),
            format!("{:.1} kB ({})", row.largest.1 as f64 / 1e3, row.largest.0),
            format!("{:.1} s", row.sync),
            format!("{:.0} MB", row.agent_mb),
            format!("{:.0} MB", row.controller_mb),
        ]);
    }
    println!("{table}\n");
    println!("An idle site, L3 and L7: {:.1} MB a month (bound: {:.0})", month / 1e6, MONTH / 1e6);
    for row in rows.iter().filter(|row| row.day() > row.bound || row.largest.1 > OBJECT) {
        println!("Above a bound: {} sites", row.sites);
    }
    Ok(())
}

async fn measure() -> Result<(Vec<Row>, f64)> {
    let lab = Lab::builder().up().await?;
    lab.cluster().apply_gateways(lab.site()).await?;
    // Synthetic sites have no Pods.
    let controller = lab.start_controller_with(&["--agent-timeout=1000h"]).await?;
    let _agents = [lab.start_agent("cloud-a").await?, lab.start_agent("x-a").await?];
    let mut measured = lab.start_agent("y-b").await?;
    let [tunnel, proxy] = [4500, 10262].map(|port| Meter::of_port(&lab.pool("edge-x").router, port));
    let (tunnel, proxy) = (tunnel?, proxy?);
    proof::ready(&measured).await?;
    let api = lab.cluster().server_for(lab.site(), lab.node("y-b"));
    let port = api.rsplit(':').next().context("the API server has a port")?;
    let received = Meter::start(&lab.node("y-b").ns, "api", "input", &[&format!("tcp sport {port}")])?;

    let sites = Sites { cluster: lab.cluster() };
    let (mut rows, mut month, mut have) = (Vec::new(), 0.0, 0);
    for (count, bound) in SITES {
        eprintln!("writing the objects of {count} sites");
        let written = stream::iter(have..count).map(|n| sites.create(n));
        written.buffer_unordered(WRITERS).try_collect::<Vec<()>>().await?;
        have = count;
        let ns = lab.node("y-b").ns.clone();
        let complete = || async {
            let dump = ns.run("bpftool", &["-j", "map", "dump", "pinned", REMOTE])?;
            let entries = serde_json::from_str::<Vec<Value>>(&dump)?.len();
            ensure!(entries >= count, "{entries} of {count} prefixes");
            Ok(())
        };
        let within = Duration::from_secs(600);
        eventually(within, "the agent knows every site", complete).await?;
        // A start with the whole topology, as after a reboot without a snapshot.
        let begin = std::time::Instant::now();
        measured.kill()?;
        std::fs::remove_file(lab.node("y-b").dir.join("raven/topology.json")).ok();
        measured.restart()?;
        proof::ready(&measured).await?;
        eventually(within, "the agent knows every site", complete).await?;
        let sync = begin.elapsed().as_secs_f64();
        eventually(within, "no more bytes arrive", || quiet(&received)).await?;

        eprintln!("measuring a quiet cluster of {count} sites for {} s", IDLE.as_secs());
        let (idle, l3, l7) = tokio::join!(received.month(IDLE), tunnel.month(SESSION), proxy.month(SESSION));
        let idle = idle? / 30.0;
        if rows.is_empty() {
            month = l3? + l7?;
        }
        eprintln!("measuring reconnections");
        let before = received.bytes()?;
        let reconnections = RECONNECTIONS.min(count);
        for n in 0..reconnections {
            sites.reconnect(n).await?;
        }
        eventually(within, "no more bytes arrive", || quiet(&received)).await?;
        let reconnection = (received.bytes()? - before) as f64 / reconnections as f64;
        rows.push(Row {
            sites: count,
            bound,
            idle,
            reconnection,
            largest: sites.largest().await?,
            sync,
            agent_mb: memory_mb(measured.process.pid(), "VmRSS")?,
            controller_mb: memory_mb(controller.pid(), "VmRSS")?,
        });
    }
    Ok((rows, month))
}

/// The map of prefixes of other pools.
const REMOTE: &str = "/sys/fs/bpf/raven/v1/maps/REMOTE4";

/// Fails while more than the bytes of a quiet connection arrive.
async fn quiet(meter: &Meter) -> Result<()> {
    let before = meter.bytes()?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let new = meter.bytes()? - before;
    ensure!(new < 1000, "{new} bytes in three seconds");
    Ok(())
}

/// Writes the objects of synthetic sites with one node each.
struct Sites<'a> {
    cluster: &'a Cluster,
}

fn apply(manager: &str) -> PatchParams {
    PatchParams::apply(manager).force()
}

impl Sites<'_> {
    async fn create(&self, n: usize) -> Result<()> {
        let (gateway, node) = (format!("site-{n}"), format!("site-{n}-node"));
        let object = json!({ "apiVersion": "raven.openyurt.io/v1beta1", "kind": "Gateway", "metadata": { "name": gateway },
            "spec": { "endpoints": [{ "nodeName": node, "type": "tunnel", "underNAT": true }, { "nodeName": node, "type": "proxy", "underNAT": true }] } });
        let gateways: Api<Gateway> = Api::all(self.cluster.client());
        gateways.patch(&gateway, &apply("person"), &Patch::Apply(&object)).await.context("write a Gateway")?;
        let (high, low) = (n / 256, n % 256);
        let object = json!({ "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": node, "labels": { LABEL_EDGE_WORKER: "true", LABEL_GATEWAY: gateway } },
            "spec": { "podCIDRs": [format!("11.{high}.{low}.0/24"), format!("fd11:{n:x}::/64")] } });
        let nodes: Api<Node> = Api::all(self.cluster.client());
        nodes.patch(&node, &apply("person"), &Patch::Apply(&object)).await.context("write a Node")?;
        let address =
            json!({ "status": { "addresses": [{ "type": "InternalIP", "address": format!("172.16.{high}.{low}") }] } });
        nodes.patch_status(&node, &PatchParams::default(), &Patch::Merge(&address)).await.context("set its address")?;
        self.cluster.set_ready(&node, true).await?;
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&(n as u64 + 1).to_be_bytes());
        let key = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, key);
        let object = json!({ "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": { "name": node },
            "spec": { "gateway": gateway, "publicKey": key, "listenPort": 4500, "addresses": ["172.16.0.1"], "version": "1" } });
        let published: Api<GatewayNode> = Api::all(self.cluster.client());
        published.patch(&node, &apply("agent"), &Patch::Apply(&object)).await.context("write a GatewayNode")?;
        self.set_connected(&node, true).await
    }

    /// A site that loses its link for a while: the Node becomes NotReady, and the agent reports when the link is back.
    async fn reconnect(&self, n: usize) -> Result<()> {
        let node = format!("site-{n}-node");
        for ready in [false, true] {
            self.cluster.set_ready(&node, ready).await?;
            let gateways: Api<Gateway> = Api::all(self.cluster.client());
            let name = format!("site-{n}");
            eventually(Duration::from_secs(60), "the controller has seen it", || async {
                let conditions = gateways.get(&name).await?.status.context("no status")?.conditions;
                let elected = conditions.iter().find(|c| c.type_ == "Elected").context("no condition")?;
                ensure!((elected.status == "True") == ready, "{}", elected.message);
                Ok(())
            })
            .await?;
        }
        for connected in [false, true] {
            self.set_connected(&node, connected).await?;
        }
        Ok(())
    }

    async fn set_connected(&self, node: &str, connected: bool) -> Result<()> {
        let status = if connected { "True" } else { "False" };
        let condition = |type_: &str| json!({ "type": type_, "status": status, "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" });
        let conditions = ["Ready", "TunnelConnected", "ProxyConnected"].map(condition);
        let tunnels: &[&str] = if connected { &["cloud-a"] } else { &[] };
        let object = json!({ "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": { "name": node },
            "status": { "wireguardBackend": "kernel", "dataplaneTier": "xdp+tc", "peerSummary": "1/1",
                "peers": [{ "nodeName": "cloud-a", "gateway": "cloud", "observedEndpoint": "198.51.100.10:4500" }],
                "proxy": { "ready": connected, "message": "", "tunnels": tunnels },
                "conditions": conditions } });
        let published: Api<GatewayNode> = Api::all(self.cluster.client());
        published.patch_status(node, &apply("agent"), &Patch::Apply(&object)).await.context("write a report")?;
        Ok(())
    }

    /// Name and size of Raven's largest object.
    async fn largest(&self) -> Result<(String, usize)> {
        let maps: Api<ConfigMap> = Api::namespaced(self.cluster.client(), raven_api::DEFAULT_NAMESPACE);
        let largest = [
            largest_of("Gateway", Api::<Gateway>::all(self.cluster.client())).await?,
            largest_of("GatewayNode", Api::<GatewayNode>::all(self.cluster.client())).await?,
            largest_of("ConfigMap", maps).await?,
        ];
        largest.into_iter().flatten().max_by_key(|(_, size)| *size).context("there is no object")
    }
}

async fn largest_of<K>(kind: &str, api: Api<K>) -> Result<Option<(String, usize)>>
where
    K: Resource + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    let mut sizes = Vec::new();
    for object in api.list(&Default::default()).await?.items {
        sizes.push((format!("{kind} {}", object.name_any()), serde_json::to_vec(&object)?.len()));
    }
    Ok(sizes.into_iter().max_by_key(|(_, size)| *size))
}
