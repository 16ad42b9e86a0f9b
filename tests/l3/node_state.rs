//! Tests of Raven's state on nodes: `raven-agent cleanup`, the key, and the restoration of deleted state.

use raven_tests::{proof, require_root};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_leaves_nothing_behind() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    // On the gateway nodes of both L7 roles (client and server) and on a member.
    for (node, folder) in [("x-a", "proxy.client"), ("cloud-a", "proxy.server")] {
        let ns = &running.lab.node(node).ns;
        let list = format!("ls /var/lib/raven/{folder}/pki/identity.pem");
        let signed = raven_tests::eventually(std::time::Duration::from_secs(30), "a certificate is signed", || async {
            ns.sh(&list)
        });
        running.check(signed.await);
    }
    for node in ["x-a", "x-b", "cloud-a"] {
        let index = running.agents.iter().position(|a| a.node.name == node).expect("the node has an agent");
        let mut agent = running.agents.swap_remove(index);
        let result = proof::cleaned(&running.lab, &mut agent);
        running.check(result);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn key_is_created_on_the_node_and_survives_restarts() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    let read = |running: &Running| {
        running.check(
            running.lab.node("x-a").ns.sh("stat -c %a /var/lib/raven/wireguard.key; cat /var/lib/raven/wireguard.key"),
        )
    };
    let before = read(&running);
    assert!(before.starts_with("600\n"), "{before}");
    running.agent("x-a").restart().expect("restart the agent");
    let ready = proof::ready(running.agent("x-a")).await;
    running.check(ready);
    assert_eq!(read(&running), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_routes_rules_and_nft_table_are_restored() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    for node in ["x-a", "x-b"] {
        let ns = &running.lab.node(node).ns;
        let show = "ip rule show pref 100; ip -6 rule show pref 100; ip route show table 9027; ip -6 route show table 9027; nft list table inet raven";
        let before = running.check(ns.sh(show));
        assert!(before.lines().count() >= 10, "{before}");
        running.check(ns.sh(
            "ip rule del pref 100; ip -6 rule del pref 100; ip route flush table 9027; ip -6 route flush table 9027",
        ));
        let restored = || async {
            let now = ns.sh(show)?;
            anyhow::ensure!(now == before, "now: {now}\nbefore: {before}");
            Ok(())
        };
        const SOON: std::time::Duration = std::time::Duration::from_secs(5);
        running.check(raven_tests::eventually(SOON, "routes and rules are restored", restored).await);
        // As at a restart of nftables.service, and by hand.
        for command in ["nft flush ruleset", "nft flush table inet raven"] {
            running.check(ns.sh(command));
            running.check(
                raven_tests::eventually(SOON, &format!("the table is restored after {command}"), restored).await,
            );
        }
        // The counter increases at the end of a run that restored something without another cause. A run that also
        // applies a new topology does not count, so the rule is deleted again until it is counted.
        let counted =
            raven_tests::eventually(std::time::Duration::from_secs(20), "the restoration is counted", || async {
                let counted = proof::metric(ns, "raven_restored_total").await?;
                if counted.is_none_or(|n| n == 0) {
                    ns.sh("ip rule del pref 100")?;
                }
                anyhow::ensure!(counted.is_some_and(|n| n > 0), "{counted:?}");
                Ok(())
            });
        running.check(counted.await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_gateway_node_is_recreated() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let key = || {
        running.lab.cluster().kubectl(&[
            "get",
            "gatewaynode",
            "x-a",
            "-o",
            "jsonpath={.metadata.uid} {.spec.publicKey} {.status.peerSummary} {.spec.publicKeyProof}",
        ])
    };
    let before = running.check(key());
    running.check(running.lab.cluster().kubectl(&["delete", "gatewaynode", "x-a"]));
    let recreated = raven_tests::eventually(
        std::time::Duration::from_secs(40),
        "the object exists with its key and status",
        || async {
            let now = key()?;
            let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
            let (old, new) = (words(&before), words(&now));
            anyhow::ensure!(new.len() == 4 && new[0] != old[0] && new[1] == old[1] && new[2] == "1/1", "{now}");
            anyhow::ensure!(raven_api::key_proof::is_proven(&new[1], "x-a", &new[3]), "{now}");
            Ok(())
        },
    );
    running.check(recreated.await);
    running.check(proof::converged(&running.lab).await);
}
