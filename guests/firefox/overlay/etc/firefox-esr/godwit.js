// Nothing that talks to the network by itself, asks, or moves on the screen.
pref("app.normandy.enabled", false);
pref("app.update.auto", false);
pref("browser.aboutwelcome.enabled", false);
pref("browser.newtabpage.enabled", false);
pref("browser.sessionstore.resume_from_crash", false);
pref("browser.shell.checkDefaultBrowser", false);
pref("browser.startup.homepage", "about:blank");
pref("datareporting.policy.dataSubmissionEnabled", false);
pref("extensions.update.enabled", false);
pref("network.captive-portal-service.enabled", false);
pref("network.connectivity-service.enabled", false);
pref("toolkit.telemetry.enabled", false);
pref("ui.caretBlinkTime", 0);
