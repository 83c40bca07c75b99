// What a person asked and cannot have, in one sentence that is shown as it is. Any other error is a bug of the page.

export class Refused extends Error {}
