//! Tests of pools with encryption (`encryption: pool`): WireGuard also encrypts the packets between a member and its gateway
//! node, and nothing else is accepted there.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use raven_common::Verdict;
use raven_tests::{Lab, PoolSpec, eventually, probe, proof, require_root};

use crate::Running;

const SOON: Duration = Duration::from_secs(60);

/// Waits until the nodes exchange packets with other pools through `raven-wg0`, or through `raven0`.
async fn sends_by(lab: &Lab, nodes: &[&str], device: &str) -> Result<()> {
    for node in nodes {
        let target = if node.starts_with("cloud") { lab.pod("y-b").v4 } else { lab.pod("cloud-b").v4 };
        let what = format!("{node} sends to other pools by {device}");
        eventually(SOON, &what, || async {
            let route = lab.node(node).ns.run("ip", &["route", "get", &target.to_string()])?;
            ensure!(route.contains(&format!("dev {device} ")), "{route}");
            Ok(())
        })
        .await?;
    }
    proof::converged(lab).await.map(drop)
}

async fn start() -> Running {
    start_with(PoolSpec::three()).await
}

async fn start_with(pools: Vec<PoolSpec>) -> Running {
    let running = Running::of(Lab::builder().pools(pools)).await.expect("start the lab");
    for gateway in ["cloud", "edge-x"] {
        running.check(running.lab.cluster().set_encryption(gateway, "pool"));
    }
    running.check(sends_by(&running.lab, &["cloud-b", "x-b"], "raven-wg0").await);
    running
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_of_encrypted_pools_are_never_in_clear() {
    require_root!();
    let mut running = start().await;
    let lab = &running.lab;
    let before = running.check(proof::all_counters(lab));
    println!("{}", running.check(proof::encrypted_inside(lab, &["x-a", "x-b", "cloud-a", "cloud-b"]).await));
    for family in 0..proof::FAMILIES.len() {
        for (from, to) in [("x-b", "cloud-b"), ("cloud-b", "x-b"), ("y-b", "x-b"), ("x-b", "y-b")] {
            running.check(proof::bulk(lab, from, to, family, 2_000_000).await);
        }
    }
    running.check(proof::no_drops(lab, &before));
    for gateway in ["x-a", "cloud-a"] {
        let after = running.check(proof::counters(lab.node(gateway)));
        for verdict in [Verdict::FromMember, Verdict::ToMember] {
            let packets = proof::increase(&before[gateway], &after, verdict);
            assert!(packets > 100, "{gateway}: {packets} packets: {}", verdict.as_str());
        }
    }
    running.check(proof::traceroute(lab));
    running.check(proof::unfragmented(lab, 2_000_000).await);

    // The members' engines, sessions and programs outlive their agents.
    let Running { lab, agents, .. } = &mut running;
    let restarted = proof::restart(lab, agents, "x-b", "cloud-b", 0).await;
    println!("{}", running.check(restarted));

    // The GatewayNode of a member shows its tunnel; a member is no site that can be cut off.
    let lab = &running.lab;
    let shown = || async {
        let listed = lab.cluster().kubectl(&["get", "gatewaynodes", "x-b", "-o", "jsonpath={.status}"])?;
        ensure!(listed.contains(r#""peerSummary":"1/1""#) && !listed.contains("TunnelConnected"), "{listed}");
        Ok(())
    };
    running.check(eventually(SOON, "the member's GatewayNode shows its peer", shown).await);

    // Off again: the overlay carries the packets, and no tunnel is left on members.
    for gateway in ["cloud", "edge-x"] {
        running.check(lab.cluster().set_encryption(gateway, ""));
    }
    running.check(sends_by(lab, &["cloud-b", "x-b"], "raven0").await);
    let gone = || async {
        ensure!(lab.node("x-b").ns.run("ip", &["link", "show", "raven-wg0"]).is_err(), "raven-wg0 exists");
        let nodes = lab.cluster().kubectl(&["get", "gatewaynodes", "-o", "name"])?;
        ensure!(!nodes.contains("x-b"), "{nodes}");
        Ok(())
    };
    running.check(eventually(SOON, "a member without encryption has no tunnel", gone).await);
    // The check of captures sees what is in clear.
    let seen = proof::encrypted_inside(lab, &["x-b"]).await.expect_err("packets in clear");
    assert!(seen.to_string().contains("the marker crossed unencrypted"), "{seen:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pool_with_ipv6_only_is_encrypted() {
    require_root!();
    let running = start_with(PoolSpec::three_with_ipv6_only(&["edge-x"])).await;
    println!("{}", running.check(proof::encrypted_inside(&running.lab, &["x-a", "x-b"]).await));
    running.check(proof::unfragmented(&running.lab, 2_000_000).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn unencrypted_packets_are_dropped_in_an_encrypted_pool() {
    require_root!();
    let running = start().await;
    let lab = &running.lab;
    let (gateway, member) = (lab.node("x-a"), lab.node("x-b"));
    let (own, remote) = (lab.pod("x-b").v4, lab.pod("cloud-b").v4);
    // An attacker who controls the LAN can send from any of its addresses; those of the nodes themselves are the hardest case.
    for (from, to, source, destination) in [(member, gateway, own, remote), (gateway, member, remote, own)] {
        let before = running.check(proof::counters(to));
        running.check(proof::forged_overlay(&from.ns, to, source, destination));
        let counted = || async {
            let after = proof::counters(to)?;
            let packets = proof::increase(&before, &after, Verdict::DropNotEncrypted);
            ensure!(packets == 1, "{}: {packets} packets", to.name);
            Ok(())
        };
        running.check(eventually(SOON, "the packet is dropped and counted", counted).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn encrypted_pool_works_after_another_gateway_node_is_elected() {
    require_root!();
    let running = start().await;
    let lab = &running.lab;
    running.check(lab.cluster().set_ready("x-a", false).await);
    let elected = || async {
        let node = lab.cluster().kubectl(&[
            "get",
            "gateway",
            "edge-x",
            "-o",
            r#"jsonpath={.status.activeEndpoints[?(@.type=="tunnel")].nodeName}"#,
        ])?;
        ensure!(node == "x-b", "{node:?}");
        Ok(())
    };
    running.check(eventually(SOON, "x-b is elected", elected).await);
    let through = || async {
        probe::ping(&lab.pod("x-a").ns, lab.pod("cloud-b").v4.into()).await?.context("no answer")?;
        let after = proof::counters(lab.node("x-b"))?;
        ensure!(after.get(&Verdict::FromMember).is_some_and(|packets| *packets > 0), "{after:?}");
        Ok(())
    };
    running.check(eventually(SOON, "packets of x-a, now a member, pass through x-b", through).await);
    let ends = [("x-a", "cloud-b"), ("x-b", "cloud-b"), ("y-b", "x-a"), ("cloud-b", "x-b")];
    for (from, to) in ends {
        for address in lab.pod(to).addresses() {
            let answers = || async { probe::ping(&lab.pod(from).ns, address).await?.context("no answer") };
            running.check(eventually(SOON, &format!("{from} reaches {address} of {to}"), answers).await);
        }
    }
    running.check(lab.cluster().put_setting("raven-agent-config", "forward-node-ip", "true").await);
    for (from, to) in ends {
        let address = lab.node(to).lan_v4.into();
        let answers = || async { probe::ping(&lab.node(from).ns, address).await?.context("no answer") };
        running.check(eventually(SOON, &format!("node {from} reaches node {to}"), answers).await);
    }
}
