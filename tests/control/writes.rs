//! Tests of when the controller writes, and of its permissions.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use raven_api::proxy::INTERNAL_SERVICE;
use raven_tests::{eventually, test_name};
use serde_json::json;

use crate::fixture::{Fixture, SOON, run};

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_and_restarts_cause_no_writes() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        let mut controller = fixture.controller("one", &[]).await?;
        fixture.two_pools_are_ready().await?;
        let settled = both(fixture).await?;

        for second in 0..10 {
            for node in ["c-a", "x-a", "x-b"] {
                heartbeat(fixture, node, second).await?;
            }
        }
        fixture.fence().await?;
        assert_eq!(both(fixture).await?, settled, "heartbeats must not change a status");

        // On SIGTERM the controller releases the Lease, so the next one starts immediately and finds nothing to change.
        controller.signal(Signal::SIGTERM)?;
        let ended = eventually(SOON, "the controller ends", || {
            let ended = controller.ended();
            async { ended?.context("the controller is still running") }
        });
        let status = ended.await?;
        ensure!(status.success(), "the controller ended with {status}: {}", controller.output()?);
        let _controller = fixture.controller("two", &[]).await?;
        fixture.fence().await?;
        assert_eq!(both(fixture).await?, settled, "a restarted controller must come to the same result");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn controller_has_only_required_permissions() {
    run(test_name!(), async |fixture| {
        let account = "--as=system:serviceaccount:kube-system:raven-controller";
        let may_in = |namespace: &str, verb: &str, what: &str| {
            let (resource, sub) = what.split_once('/').unwrap_or((what, ""));
            let subresource = format!("--subresource={sub}");
            let answer = fixture.lab.cluster().kubectl(&[
                "auth",
                "can-i",
                verb,
                resource,
                &subresource,
                "-n",
                namespace,
                account,
            ]);
            // kubectl exits with status 1 for "no".
            answer.is_ok_and(|text| text.trim() == "yes")
        };
        let may = |verb: &str, what: &str| may_in("kube-system", verb, what);
        let (gateways, slices) = ("gateways.raven.openyurt.io", "endpointslices.discovery.k8s.io");
        let requests = "certificatesigningrequests.certificates.k8s.io";
        for (verb, what) in [
            ("list", "nodes"),
            ("list", "pods"),
            ("patch", "gatewaynodes.raven.openyurt.io/status"),
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
            ("create", "pods"),
            ("patch", "pods"),
            ("delete", "pods"),
            ("patch", "gatewaynodes.raven.openyurt.io"),
            ("get", "endpoints"),
            ("delete", "endpoints"),
        ];
        for (verb, what) in never {
            assert!(!may(verb, what), "{verb} {what}");
        }
        let by_name = format!("endpoints/{INTERNAL_SERVICE}");
        let answer =
            fixture.lab.cluster().kubectl(&["auth", "can-i", "delete", &by_name, "-n", "kube-system", account])?;
        assert_eq!(answer.trim(), "yes", "delete the Endpoints that upstream left behind");
        // Outside its own namespace, the controller has no access to Pods, Services and EndpointSlices.
        for (verb, what) in
            [("list", "pods"), ("list", slices), ("patch", slices), ("patch", "services"), ("create", "services")]
        {
            assert!(!may_in("default", verb, what), "{verb} {what} in namespace default");
        }
        Ok(())
    })
    .await;
}

async fn both(fixture: &Fixture) -> Result<[String; 2]> {
    Ok([fixture.raw("cloud").await?, fixture.raw("site").await?])
}

// The update that a kubelet sends every few minutes; in between it renews its Lease.
async fn heartbeat(fixture: &Fixture, node: &str, second: u8) -> Result<()> {
    let time = format!("2030-01-01T00:00:{second:02}Z");
    let ready = json!({"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": time});
    fixture.put_node_status(node, "raven-lab-ready", json!({"conditions": [ready]})).await
}
