//! Raven as an operator installs it: the images of `cargo xtask image`, `kubectl apply -k deploy`, and real kubelets in
//! three pools. Then what an operator does next: restarts, an upgrade, removal. [`chart`] tests the other way to install.
//!
//! Run by `cargo xtask test installed`, which makes the images.

#![forbid(unsafe_code)]

mod chart;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use raven_tests::{
    Lab, eventually,
    kubectl::{self, POD, SCRIPT},
    kubelet::Prefer,
    namespace::Namespace,
    proof::{self, Check, FAMILIES},
    real_nodes::RealNodes,
    require_root,
};
use serde_json::Value;

/// Images of deploy/, by name.
const AGENT: &str = "ghcr.io/openyurtio/raven-agent";
/// Tag of the images in deploy/kustomization.yaml.
const TAG: &str = env!("CARGO_PKG_VERSION");
const AGENTS: &str = "daemonset/raven-agent-ds";
const AGENT_PODS: &str = "--selector=app.kubernetes.io/name=raven-agent";
/// Time limit of a rollout.
const ROLLOUT: &str = "--timeout=180s";
const SOON: Duration = Duration::from_secs(120);

/// Members of two sites, in both directions: the cloud's gateway node relays.
const BOTH_WAYS: [(&str, &str); 2] = [("x-b", "y-b"), ("y-b", "x-b")];
/// Datagrams per second in each direction. Six nodes with all their Pods share this machine's processors, and while
/// agents start, the userspace engines wait for half a second: more than 400 datagrams overflow an engine's socket. The
/// L3 tests send 1,000 per second.
const RATE: u32 = 200;

#[tokio::test(flavor = "multi_thread")]
async fn installed_with_one_command_it_survives_restarts_and_leaves_nothing() {
    require_root!();
    let lab = Lab::builder().without_crds().up().await.expect("build the lab");
    let mut results = Results::default();
    let completed = scenario(&lab, &mut results).await;
    results.note("the scenario completes", completed.map(|()| String::new()));
    if !results.failed.is_empty() {
        let evidence = lab.save_failure("installed").expect("save evidence");
        panic!("failed: {}; evidence: {}", results.failed.join(", "), evidence.display());
    }
}

async fn scenario(lab: &Lab, results: &mut Results) -> Result<()> {
    results.note("the pools are isolated without Raven", proof::isolated(lab).await);
    let nodes = lab.start_real_nodes().await?;
    results.note("six real nodes are Ready", Ok(String::new()));
    for name in ["raven-agent", "raven-controller"] {
        nodes.import(&archive(name)?)?;
    }
    results.note("kubectl apply -k deploy", install(lab).await);
    lab.cluster().apply_gateways(lab.site()).await?;
    engines_ready(lab)?;
    for workload in ["deployment/raven-controller", AGENTS] {
        rolled_out(lab, workload)?;
    }
    results.note("the pools are connected", proof::converged(lab).await);
    let before = proof::all_counters(lab)?;
    let internet = proof::record(lab).await?;
    forwarding(lab, results).await;
    results.note("WireGuard sessions", proof::handshakes(lab).await);
    proxying(lab, results).await?;
    disturbances(lab, &nodes, results).await;
    results.note("no packet was dropped", proof::no_drops(lab, &before));
    let internet = internet.stop().await?;
    results.note("nothing crossed the internet unencrypted", proof::encrypted(lab, &internet));
    results.note("encryption: pool", encryption(lab).await);
    results.note("kubectl delete -k deploy, apply -k deploy/cleanup", removal(lab).await);
    Ok(())
}

/// Applies the manifests without a change: their image tag is this version's.
async fn install(lab: &Lab) -> Result<String> {
    let deploy = folder("deploy");
    let applied = lab.cluster().kubectl(&["apply", "--server-side", "-k", &deploy])?;
    let mut message = format!("{} objects", applied.lines().count());
    // A container runtime refuses capabilities that it does not have itself. Only kernels before 5.11 need this one.
    if std::process::Command::new("capsh")
        .arg("--has-b=cap_sys_resource")
        .output()
        .is_ok_and(|has| !has.status.success())
    {
        let path = "/spec/template/spec/containers/0/securityContext/capabilities/add";
        let patch = format!(
            r#"[{{"op": "test", "path": "{path}/2", "value": "SYS_RESOURCE"}}, {{"op": "remove", "path": "{path}/2"}}]"#
        );
        lab.cluster().kubectl(&["--namespace=kube-system", "patch", AGENTS, "--type=json", "--patch", &patch])?;
        message.push_str("; without SYS_RESOURCE, which this machine does not have");
    }
    Ok(message)
}

/// Waits until all Pods of a workload are replaced and Ready.
fn rolled_out(lab: &Lab, workload: &str) -> Result<String> {
    lab.cluster().kubectl(&["--namespace=kube-system", "rollout", "status", ROLLOUT, workload])?;
    Ok(format!("{workload} rolled out"))
}

/// Waits for the engine's Pods. `kubectl rollout status` does not support their update strategy, OnDelete.
fn engines_ready(lab: &Lab) -> Result<String> {
    let ready = format!("--for=jsonpath={{.status.numberReady}}={}", lab.nodes.len());
    lab.cluster().kubectl(&["--namespace=kube-system", "wait", &ready, ROLLOUT, "daemonset/raven-wireguard"])
}

/// Switches encryption inside the pools on. Members use the engine of their node, which so far had no peer.
async fn encryption(lab: &Lab) -> Result<String> {
    for gateway in ["cloud", "edge-x"] {
        lab.cluster().set_encryption(gateway, "pool")?;
    }
    eventually(Duration::from_secs(60), "members have a session with their gateway node", || async {
        for node in ["cloud-b", "x-b"] {
            let peers = ["get", "gatewaynode", node, "-o", "jsonpath={.status.peerSummary}"];
            let peers = lab.cluster().kubectl(&peers)?;
            ensure!(peers == "1/1", "{node}: {peers}");
        }
        Ok(())
    })
    .await?;
    proof::encrypted_inside(lab, &["x-a", "x-b"]).await
}

/// L3: the checks of the demo.
async fn forwarding(lab: &Lab, results: &mut Results) {
    for (n, family) in FAMILIES.iter().enumerate() {
        results.note(
            &format!("{family}: 20 MB from x-b to y-b, relayed"),
            proof::bulk(lab, "x-b", "y-b", n, 20_000_000).await,
        );
        for (a, b) in proof::pairs(lab) {
            let name = format!("{family}: {} ↔ {}", a.spec.name, b.spec.name);
            results.note(&name, proof::reach(lab, &a, &b, n).await);
        }
    }
    results.note("MTU", proof::mtu(lab, "cloud-b", "y-b").await);
}

/// L7: kubectl to a pod at a site behind NAT, through API servers in the cloud.
async fn proxying(lab: &Lab, results: &mut Results) -> Result<()> {
    lab.run_pod("x-b", POD, SCRIPT).await?;
    for node in ["cloud-b", "cloud-a"] {
        let server = lab.api_server_on(node, Prefer::InternalIP).await?;
        let path = format!("API server on {node}");
        kubectl::all(&server, &path, 5).into_iter().for_each(|check| results.check(&check));
        server.kill()?;
    }
    Ok(())
}

/// What happens to Pods, under traffic between all pools.
async fn disturbances(lab: &Lab, nodes: &RealNodes, results: &mut Results) {
    let kubectl = |args: &[&str]| lab.cluster().kubectl(&[&["--namespace=kube-system"], args].concat());
    let restart = async || {
        kubectl(&["rollout", "restart", AGENTS])?;
        rolled_out(lab, AGENTS)
    };
    results.note("kubectl rollout restart", under_traffic(lab, restart).await);
    let delete = async || {
        let before = agents(lab)?;
        kubectl(&["delete", "pod", "--wait=false", AGENT_PODS])?;
        let replaced = |now: &Agents| now.keys().all(|uid| !before.contains_key(uid));
        agents_become(lab, "replaced", replaced).await
    };
    results.note("kubectl delete pod of all agents", under_traffic(lab, delete).await);
    let kill = async || {
        let before = agents(lab)?;
        for node in &lab.nodes {
            let agent = nix::unistd::Pid::from_raw(agent_process(&node.ns)?);
            nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGKILL)?;
        }
        let restarted = |now: &Agents| now.iter().all(|(uid, agent)| agent.restarts > before[uid].restarts);
        agents_become(lab, "restarted", restarted).await
    };
    results.note("SIGKILL of all agents", under_traffic(lab, kill).await);
    let upgrade = async || {
        let (image, newer) = (format!("{AGENT}:{TAG}"), format!("{AGENT}:newer"));
        nodes.tag(&image, &newer)?;
        kubectl(&["set", "image", AGENTS, &format!("agent={newer}")])?;
        rolled_out(lab, AGENTS)
    };
    results.note("upgrade to another tag", under_traffic(lab, upgrade).await);
}

/// No datagram between the pools is lost while `disturb` runs.
async fn under_traffic(lab: &Lab, disturb: impl AsyncFnOnce() -> Result<String>) -> Result<String> {
    proof::lossless(lab, &BOTH_WAYS, 0, RATE, disturb).await
}

/// Returns the process ID of a node's agent.
fn agent_process(node: &Namespace) -> Result<i32> {
    let script = "for pid in $(ip netns pids $(ip netns identify)); do \
                  [ \"$(cat /proc/$pid/comm)\" = raven-agent ] || continue; \
                  tr '\\0' ' ' < /proc/$pid/cmdline | grep -q -- --wireguard-engine && echo $pid; done; true";
    let found = node.sh(script)?;
    let mut pids = found.lines();
    match (pids.next(), pids.next()) {
        (Some(pid), None) => Ok(pid.parse()?),
        _ => bail!("the node {} has not exactly one agent: {found:?}", node.name),
    }
}

/// State of an agent's Pod.
struct Agent {
    ready: bool,
    restarts: u64,
}

/// Pods of the agents by UID.
type Agents = BTreeMap<String, Agent>;

fn agents(lab: &Lab) -> Result<Agents> {
    let pods = lab.cluster().kubectl(&["--namespace=kube-system", "get", "pods", AGENT_PODS, "--output=json"])?;
    let pods: Value = serde_json::from_str(&pods)?;
    let pods = pods["items"].as_array().context("kubectl returned no list")?;
    let agent = |pod: &Value| {
        let container = &pod["status"]["containerStatuses"][0];
        let restarts = container["restartCount"].as_u64().unwrap_or_default();
        let ready = container["ready"] == true && pod["metadata"]["deletionTimestamp"].is_null();
        (pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned(), Agent { ready, restarts })
    };
    Ok(pods.iter().map(agent).collect())
}

/// Waits until each node has a Ready agent, and all of them fulfil `check`.
async fn agents_become(lab: &Lab, what: &str, check: impl Fn(&Agents) -> bool) -> Result<String> {
    eventually(SOON, &format!("the agents are {what}"), || async {
        let now = agents(lab)?;
        let ready = now.values().filter(|agent| agent.ready).count();
        ensure!(now.len() == lab.nodes.len() && ready == now.len(), "{ready} of {} Pods are Ready", now.len());
        ensure!(check(&now), "not all of them are {what}");
        Ok(format!("{ready} agents {what}"))
    })
    .await
}

/// Removes Raven as docs/operating.md describes.
async fn removal(lab: &Lab) -> Result<String> {
    let cluster = lab.cluster();
    cluster.kubectl(&["delete", "-k", &folder("deploy"), "--timeout=120s"])?;
    cluster.kubectl(&["apply", "-k", &folder("deploy/cleanup")])?;
    rolled_out(lab, "daemonset/raven-cleanup")?;
    // The cleanup is repeated, because removed Pods may still terminate after the first one.
    eventually(SOON, "nothing is left", || async { lab.nodes.iter().try_for_each(proof::nothing_left) }).await?;
    cluster.kubectl(&["delete", "-k", &folder("deploy/cleanup")])?;
    Ok(format!("{} nodes are clean", lab.nodes.len()))
}

/// Returns the path of a folder of the repository.
fn folder(name: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).with_file_name(name).to_string_lossy().into_owned()
}

/// Returns an archive that `cargo xtask image` has made.
fn archive(name: &str) -> Result<PathBuf> {
    let images =
        std::env::var_os("RAVEN_IMAGES").context("RAVEN_IMAGES is not set: run `cargo xtask test installed`")?;
    let path = PathBuf::from(images).join(format!("{name}-{TAG}-amd64.tar"));
    ensure!(path.is_file(), "{} does not exist: run `cargo xtask image`", path.display());
    Ok(path)
}

/// Prints each check when it is done, and keeps the names of failed ones.
#[derive(Default)]
struct Results {
    failed: Vec<String>,
}

impl Results {
    fn note(&mut self, name: &str, result: Result<String>) {
        self.check(&Check::new(name, result));
    }

    fn check(&mut self, check: &Check) {
        println!("  {} {}: {}", if check.ok { "ok" } else { "FAILED" }, check.name, check.detail);
        if !check.ok {
            self.failed.push(check.name.clone());
        }
    }
}
