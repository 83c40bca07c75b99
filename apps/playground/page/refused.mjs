// An error in the user's input, with a one-sentence message to show. Any other error is a bug of the page.

export class Refused extends Error {}
