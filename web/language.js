// Asks ComfyUI for the pack's texts in the user's language, before any node is made.

import { app } from "../../scripts/app.js";
import { setTexts } from "./texts.js";

app.registerExtension({
  name: "DiffScaler.Language",
  async init() {
    try {
      const language = app.extensionManager?.setting?.get("Comfy.Locale")
        ?? app.ui.settings.getSettingValue("Comfy.Locale");
      const answer = await app.api.fetchApi("/i18n");
      setTexts((await answer.json())[language]?.diffscaler);
    } catch {
      // an older ComfyUI has no such route: English
    }
  },
});
