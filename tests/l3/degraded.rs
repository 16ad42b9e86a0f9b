//! Tests of partial failures: a missing resource or a disabled feature affects nothing else.

use anyhow::{Context, Result};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use raven_api::{Gateway, gateway::EndpointType};
use raven_tests::{
    eventually,
    probe::{Echo, Flow},
    proof, require_root,
};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn tunnel_keeps_old_port_while_new_port_is_in_use() {
    require_root!();
    const TAKEN: u16 = 4600;
    let running = Running::start().await.expect("start the lab");
    let node = running.lab.node("x-a").clone();
    let taken = Echo::on(&node.ns, ([0, 0, 0, 0], TAKEN).into()).expect("occupy the port");
    let gateways: Api<Gateway> = Api::all(running.lab.cluster().client());
    let change = async |port: u16| -> Result<()> {
        let mut endpoints = gateways.get("edge-x").await?.spec.endpoints;
        endpoints.iter_mut().filter(|e| e.type_ == EndpointType::Tunnel).for_each(|e| e.port = Some(i32::from(port)));
        let patch = serde_json::json!({ "spec": { "endpoints": endpoints } });
        gateways
            .patch("edge-x", &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .map(drop)
            .context("change edge-x")
    };
    let (from, to) = (running.lab.pod("x-b"), running.lab.pod("cloud-b"));
    let flow = Flow::start(&from.ns, &to.ns, to.v4.into(), 500).expect("start the flow");
    running.check(change(TAKEN).await);
    running.until_ready("the port is reported", |status, m| status == "False" && m.contains(&TAKEN.to_string())).await;
    let report = running.check(flow.stop().await);
    assert_eq!(report.lost, 0, "{report:?}");
    let programs =
        running.check(node.ns.sh("ls /sys/fs/bpf/raven/v1/links 2>/dev/null; tc filter show dev raven-wg0 ingress"));
    assert!(programs.contains("tunnel_ingress"), "packets of peers are still checked: {programs}");
    drop(taken);
    running.until_ready("the port is used when it is free", |status, _| status == "True").await;
    let listening = running.check(node.ns.sh("ss -lunH"));
    assert!(listening.contains(&format!(":{TAKEN} ")), "{listening}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv4_works_on_node_with_ipv6_disabled() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    for node in ["x-a", "x-b"] {
        running.agent(node).kill().expect("kill the agent");
        let ns = running.lab.node(node).ns.clone();
        // As on hardened systems, IPv6 is disabled before Raven's devices are created.
        running.check(running.lab.agent_command(node, &["cleanup", "--keep-state"]));
        running.check(ns.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1"));
        running.agent(node).restart().expect("restart the agent");
    }
    let (cloud, edge) = (running.lab.pool("cloud").clone(), running.lab.pool("edge-x").clone());
    let connected =
        eventually(std::time::Duration::from_secs(30), "IPv4 works", || proof::reach(&running.lab, &cloud, &edge, 0));
    running.check(connected.await);
    for node in ["x-a", "x-b"] {
        let ready = proof::ready(running.agent(node)).await;
        running.check(ready);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hung_engine_is_restarted() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    // ss lists the sockets of the node's network namespace only, so this is the node's own engine.
    let stopped = "kill -STOP $(ss -Hxlp | grep raven-wg0.sock | grep -o 'pid=[0-9]*' | head -n 1 | cut -d= -f2)";
    running.check(running.lab.node("x-a").ns.sh(stopped));
    let (cloud, edge) = (running.lab.pool("cloud").clone(), running.lab.pool("edge-x").clone());
    // The agent queries the engine within 30 s and gives up after 10 s.
    let connected = eventually(std::time::Duration::from_secs(90), "the pools are connected again", || {
        proof::reach(&running.lab, &cloud, &edge, 0)
    });
    running.check(connected.await);
}
