//! `raven-agent cleanup`, and the state that stays without it.

use raven_tests::{privileged, proof};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_leaves_nothing_behind() {
    if !privileged("cleanup_leaves_nothing_behind") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    // Both halves, at their gateway nodes and without: what dials, what is dialled, and what is neither.
    for (node, folder) in [("x-a", "proxy.client"), ("cloud-a", "proxy.server")] {
        let ns = &running.lab.node(node).ns;
        let look = format!("ls /var/lib/raven/{folder}/pki/identity.pem");
        let signed = raven_tests::eventually(std::time::Duration::from_secs(30), "a certificate is signed", || async { ns.sh(&look) });
        running.check(signed.await);
    }
    for node in ["x-a", "x-b", "cloud-a"] {
        let index = running.agents.iter().position(|a| a.node.name == node).expect("an agent");
        let mut agent = running.agents.swap_remove(index);
        let result = proof::cleaned(&running.lab, &mut agent);
        running.check(result);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_is_made_on_the_node_and_stays_across_restarts() {
    if !privileged("the_key_is_made_on_the_node_and_stays_across_restarts") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    let read = |running: &Running| {
        running.check(running.lab.node("x-a").ns.sh("stat -c %a /var/lib/raven/wireguard.key; cat /var/lib/raven/wireguard.key"))
    };
    let before = read(&running);
    assert!(before.starts_with("600\n"), "{before}");
    running.agent("x-a").restart().expect("the agent starts again");
    let ready = proof::ready(running.agent("x-a")).await;
    running.check(ready);
    assert_eq!(read(&running), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_and_rules_that_somebody_deletes_come_back() {
    if !privileged("routes_and_rules_that_somebody_deletes_come_back") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    for node in ["x-a", "x-b"] {
        let ns = &running.lab.node(node).ns;
        let look = "ip rule show pref 100; ip -6 rule show pref 100; ip route show table 9027; ip -6 route show table 9027";
        let before = running.check(ns.sh(look));
        assert!(before.lines().count() >= 10, "{before}");
        running.check(ns.sh("ip rule del pref 100; ip -6 rule del pref 100; ip route flush table 9027; ip -6 route flush table 9027"));
        let back = raven_tests::eventually(std::time::Duration::from_secs(5), "all of it is back", || async {
            let now = ns.sh(look)?;
            anyhow::ensure!(now == before, "now: {now}\nbefore: {before}");
            Ok(())
        });
        running.check(back.await);
        // The count comes with the end of the run that put them back. What comes back in a run that has news is put down to the news, so
        // it is taken away again until it counts.
        let counted = raven_tests::eventually(std::time::Duration::from_secs(20), "it is counted", || async {
            let counted = proof::metric(ns, "raven_put_back_total").await?;
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
async fn an_announcement_that_somebody_deleted_is_made_again() {
    if !privileged("an_announcement_that_somebody_deleted_is_made_again") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let key = || {
        running.lab.cluster().kubectl(&[
            "get",
            "gatewaynode",
            "x-a",
            "-o",
            "jsonpath={.metadata.uid} {.spec.publicKey} {.status.peerSummary}",
        ])
    };
    let before = running.check(key());
    running.check(running.lab.cluster().kubectl(&["delete", "gatewaynode", "x-a"]));
    let again = raven_tests::eventually(std::time::Duration::from_secs(40), "it is there again, with its key and its status", || async {
        let now = key()?;
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let (old, new) = (words(&before), words(&now));
        anyhow::ensure!(new.len() == 3 && new[0] != old[0] && new[1] == old[1] && new[2] == "1/1", "{now}");
        Ok(())
    });
    running.check(again.await);
    running.check(proof::converged(&running.lab).await);
}
