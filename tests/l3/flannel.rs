//! The real flannel as the CNI of all nodes. It has routes for the nodes of all pools, and masquerades what leaves the
//! cluster; Raven carries what is for other pools.

use std::time::Duration;

use anyhow::{Context, Result};
use raven_tests::kubernetes::binaries::FLANNEL;
use raven_tests::process::Process;
use raven_tests::{Lab, Masquerade, MasqueradeBy, Node, cni, eventually, probe, proof, require_root, test_name};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn pools_with_flannel_vxlan_are_connected() {
    require_root!();
    connected(test_name!(), "vxlan").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pools_with_flannel_host_gw_are_connected() {
    require_root!();
    connected(test_name!(), "host-gw").await;
}

async fn connected(test: &str, backend: &str) {
    if cni::find(&FLANNEL, test).expect("look for flannel").is_none() {
        return;
    }
    // Flannel masquerades by itself.
    let lab = Lab::builder().masquerade(Masquerade::Never, MasqueradeBy::Nftables).up().await.expect("start the lab");
    let flannel: Result<Vec<Process>> = lab.nodes.iter().map(|node| lab.start_flannel(node, backend)).collect();
    let _flannel = flannel.expect("start flannel");
    let running = Running::begin(lab).await.expect("start Raven");
    let lab = &running.lab;
    running.check(neighbours_reach_each_other(lab).await);
    running.check(proof::converged(lab).await);
    for (a, b) in proof::pairs(lab) {
        for family in 0..2 {
            running.check(proof::reach(lab, &a, &b, family).await);
        }
    }
    running.check(proof::bulk(lab, "x-b", "y-b", 0, 20_000_000).await);
    running.check(proof::bulk(lab, "x-b", "y-b", 1, 20_000_000).await);
    running.check(neighbours_reach_each_other(lab).await);
}

/// Within each pool, pods of different nodes reach each other by flannel.
async fn neighbours_reach_each_other(lab: &Lab) -> Result<()> {
    for pool in &lab.site().pools {
        let nodes: Vec<&Node> = lab.site().nodes_of(&pool.spec.name).collect();
        let (from, to) = (lab.pod(&nodes[0].name), lab.pod(&nodes[1].name));
        for address in to.addresses() {
            eventually(Duration::from_secs(30), &format!("{} reaches {address}", nodes[0].name), || async {
                probe::ping(&from.ns, address).await?.context("no answer")
            })
            .await?;
        }
    }
    Ok(())
}
