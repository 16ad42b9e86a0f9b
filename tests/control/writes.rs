//! When the controller writes, and when not; and what it may.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use raven_api::proxy::INTERNAL_SERVICE;
use raven_tests::eventually;
use serde_json::json;

use crate::stage::{SOON, Stage, play};

#[tokio::test(flavor = "multi_thread")]
async fn neither_heartbeats_nor_a_restart_cause_a_write() {
    play("neither_heartbeats_nor_a_restart_cause_a_write", async |stage| {
        stage.put_two_pools().await?;
        let mut controller = stage.controller("one", &[]).await?;
        stage.two_pools_are_ready().await?;
        let settled = both(stage).await?;

        for second in 0..10 {
            for node in ["c-a", "x-a", "x-b"] {
                heartbeat(stage, node, second).await?;
            }
        }
        stage.fence().await?;
        assert_eq!(both(stage).await?, settled, "heartbeats change nothing that a status says");

        // It hands the Lease back, so the next one need not wait; and finds that all is as it should be.
        controller.signal(Signal::SIGTERM)?;
        let ended = eventually(SOON, "the controller ends", || {
            let ended = controller.ended();
            async { ended?.context("it runs") }
        });
        let status = ended.await?;
        ensure!(status.success(), "the controller ended with {status}: {}", controller.output()?);
        let _controller = stage.controller("two", &[]).await?;
        stage.fence().await?;
        assert_eq!(both(stage).await?, settled, "a controller that starts anew comes to the same result");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_controller_may_do_its_work_and_no_more() {
    play("the_controller_may_do_its_work_and_no_more", async |stage| {
        let account = "--as=system:serviceaccount:kube-system:raven-controller";
        let may_in = |namespace: &str, verb: &str, what: &str| {
            let (resource, sub) = what.split_once('/').unwrap_or((what, ""));
            let subresource = format!("--subresource={sub}");
            let answer = stage.lab.cluster().kubectl(&["auth", "can-i", verb, resource, &subresource, "-n", namespace, account]);
            // kubectl ends with 1 to say no.
            answer.is_ok_and(|text| text.trim() == "yes")
        };
        let may = |verb: &str, what: &str| may_in("kube-system", verb, what);
        let (gateways, slices) = ("gateways.raven.openyurt.io", "endpointslices.discovery.k8s.io");
        let requests = "certificatesigningrequests.certificates.k8s.io";
        for (verb, what) in [
            ("list", "nodes"),
            ("create", gateways),
            ("patch", &format!("{gateways}/status")),
            ("create", "leases.coordination.k8s.io"),
            ("patch", "services"),
            ("patch", slices),
            ("patch", &format!("{requests}/approval")),
        ] {
            assert!(may(verb, what), "{verb} {what}");
        }
        let never = [
            ("patch", "nodes"),
            ("update", "nodes/status"),
            ("update", gateways),
            ("patch", gateways),
            ("get", "secrets"),
            ("create", "secrets"),
            ("patch", "customresourcedefinitions.apiextensions.k8s.io"),
            ("create", "configmaps"),
            ("delete", "configmaps"),
            ("create", requests),
            ("patch", requests),
            ("list", "pods"),
            ("get", "endpoints"),
            ("delete", "endpoints"),
        ];
        for (verb, what) in never {
            assert!(!may(verb, what), "{verb} {what}");
        }
        let by_name = format!("endpoints/{INTERNAL_SERVICE}");
        let answer = stage.lab.cluster().kubectl(&["auth", "can-i", "delete", &by_name, "-n", "kube-system", account])?;
        assert_eq!(answer.trim(), "yes", "what upstream left behind");
        // Services and slices are Raven's business in its own namespace only.
        for (verb, what) in [("list", slices), ("patch", slices), ("patch", "services"), ("create", "services")] {
            assert!(!may_in("default", verb, what), "{verb} {what} in namespace default");
        }
        Ok(())
    })
    .await;
}

async fn both(stage: &Stage) -> Result<[String; 2]> {
    Ok([stage.raw("cloud").await?, stage.raw("site").await?])
}

// As a kubelet says it every few minutes, and its Lease in between.
async fn heartbeat(stage: &Stage, node: &str, second: u8) -> Result<()> {
    let time = format!("2030-01-01T00:00:{second:02}Z");
    let ready = json!({"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": time});
    stage.put_node_status(node, "raven-lab-ready", json!({"conditions": [ready]})).await
}
